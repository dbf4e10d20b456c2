//! A rule as one worker uses it: its split with its state, its filters parsed, its bucket. Rules that ask for nothing but a
//! split are marked so that requests pay for nothing else.

use crate::{
    cluster::LiveCluster,
    filter::{self, Changes},
    headers::cookie,
    live::Choice,
    reason::Reason,
    worker::Worker,
};
use http::{HeaderMap, HeaderValue, Request, Uri, uri::Scheme};
use sluice_model::{Fault, Match, Mirror, RateLimit, Redirect, Retry, Rewrite, Rule, Sticky};
use sluice_traffic::{hash::hash, rate::Bucket, split::Split, sticky};
use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

#[derive(Debug)]
pub struct LiveRule {
    pub split: RefCell<Split>,
    pub backends: Vec<Backend>,
    /// Absent: nothing is asked of requests but to be divided.
    pub asks: Option<Rc<Asks>>,
}

#[derive(Debug)]
pub struct Backend {
    pub choice: Choice,
    /// A number that names it in every worker and config, and its weight, for users that stay.
    name: u64,
    weight: u32,
    filters: Option<Rc<BackendFilters>>,
}

#[derive(Debug)]
struct BackendFilters {
    request: Changes,
    response: Changes,
    rewrite: Option<Rewrite>,
}

/// What a rule asks of its requests besides dividing them.
#[derive(Debug)]
pub struct Asks {
    matches: Vec<Match>,
    request: Changes,
    response: Changes,
    redirect: Option<Redirect>,
    rewrite: Option<Rewrite>,
    pub mirrors: Vec<(Mirror, Rc<LiveCluster>)>,
    pub request_timeout: Option<Duration>,
    pub try_timeout: Option<Duration>,
    pub retry: Option<Retry>,
    sticky: Option<Sticky>,
    pub fault: Fault,
    rate_limit: Option<RateLimit>,
    bucket: Cell<Bucket>,
    pub max_body: Option<u64>,
}

/// Where a request goes, and what is asked of it on the way.
#[derive(Debug)]
pub struct Routed {
    pub choice: Choice,
    pub asks: Option<Rc<Asks>>,
    backend: Option<Rc<BackendFilters>>,
    /// A cookie for the answer, by which the user is known from now on.
    pub cookie: Option<HeaderValue>,
}

impl Routed {
    /// By no rule.
    pub fn plain(choice: Choice) -> Self {
        Self { choice, asks: None, backend: None, cookie: None }
    }
}

impl LiveRule {
    pub fn new(
        rule: &Rule,
        split: Split,
        backends: Vec<Choice>,
        mirrors: Vec<Rc<LiveCluster>>,
        bucket: Bucket,
    ) -> Self {
        let backend = |(b, choice): (&sluice_model::Backend, Choice)| {
            let filters = BackendFilters {
                request: Changes::parse(&b.filters.request_headers),
                response: Changes::parse(&b.filters.response_headers),
                rewrite: b.filters.rewrite.clone(),
            };
            Backend {
                choice,
                name: hash(format!("{}:{}", b.service, b.port).as_bytes(), 0),
                weight: b.weight,
                filters: (!b.filters.is_empty()).then(|| filters.into()),
            }
        };
        let backends = rule.backends.iter().zip(backends).map(backend).collect();
        let plain = Rule { matches: vec![], backends: vec![], ..rule.clone() } == Rule::default();
        let asks = || {
            Rc::new(Asks {
                matches: rule.matches.clone(),
                request: Changes::parse(&rule.filters.request_headers),
                response: Changes::parse(&rule.filters.response_headers),
                redirect: rule.filters.redirect.clone(),
                rewrite: rule.filters.rewrite.clone(),
                mirrors: rule.filters.mirrors.iter().cloned().zip(mirrors).collect(),
                request_timeout: rule.timeouts.request_ms.map(Duration::from_millis),
                try_timeout: rule.timeouts.backend_request_ms.map(Duration::from_millis),
                retry: rule.retry.clone(),
                sticky: rule.sticky.clone(),
                fault: rule.fault,
                rate_limit: rule.rate_limit,
                bucket: Cell::new(bucket),
                max_body: rule.max_body_bytes,
            })
        };
        Self { split: RefCell::new(split), asks: (!plain).then(asks), backends }
    }

    /// The bucket as it is now, for the rule's next form.
    pub fn bucket(&self) -> Bucket {
        self.asks.as_ref().map(|a| a.bucket.get()).unwrap_or_default()
    }

    /// The backend of a connection.
    pub fn choose(&self) -> Result<&Backend, Reason> {
        let at = self.split.borrow_mut().choose().ok_or(Reason::NoBackend)?;
        Ok(&self.backends[at])
    }

    /// The backend of a request with these headers.
    pub fn route(&self, headers: &HeaderMap, own: &Choice, worker: &Worker) -> Result<Routed, Reason> {
        let Some(asks) = &self.asks else {
            return Ok(Routed::plain(self.choose()?.choice.clone()));
        };
        if let Some(limit) = asks.rate_limit {
            let mut bucket = asks.bucket.get();
            bucket.take(worker.now_ns(), limit).map_err(|_| Reason::RateLimited)?;
            asks.bucket.set(bucket);
        }
        if asks.redirect.is_some() {
            // Nobody takes it.
            let choice = own.clone();
            return Ok(Routed { choice, asks: Some(asks.clone()), backend: None, cookie: None });
        }
        let (key, cookie) = asks.user(headers, worker);
        let stays = key.and_then(|key| sticky::choose(self.backends.iter().map(|b| (b.name, b.weight)), key));
        let backend = match (key, stays) {
            (Some(_), Some(at)) => &self.backends[at],
            (Some(_), None) => return Err(Reason::NoBackend),
            (None, _) => self.choose()?,
        };
        Ok(Routed {
            choice: backend.choice.clone(),
            asks: Some(asks.clone()),
            backend: backend.filters.clone(),
            cookie,
        })
    }
}

impl Asks {
    /// What the user is known by, and the cookie to set where it is to be known from now on.
    fn user(&self, headers: &HeaderMap, worker: &Worker) -> (Option<u64>, Option<HeaderValue>) {
        match &self.sticky {
            None => (None, None),
            Some(Sticky::Header(name)) => (headers.get(name).map(|v| sticky::key(v.as_bytes())), None),
            Some(Sticky::Cookie(name)) => match cookie(headers, name) {
                Some(value) => (Some(sticky::key(value.as_bytes())), None),
                None => {
                    let value = format!("{:016x}{:016x}", worker.random(), worker.random());
                    let cookie = format!("{name}={value}; Path=/; HttpOnly; SameSite=Lax");
                    (Some(sticky::key(value.as_bytes())), cookie.parse().ok())
                }
            },
        }
    }

    /// The status and place of the redirect, where the rule has one.
    pub fn redirect(&self, scheme: &Scheme, host: &str, port: u16, uri: &Uri) -> Option<(u16, Option<HeaderValue>)> {
        let redirect = self.redirect.as_ref()?;
        Some((redirect.status, filter::location(redirect, &self.matches, scheme, host, port, uri)))
    }
}

impl Routed {
    /// Changes the request's head as the rule and then the backend ask.
    pub fn change_request<B>(&self, request: &mut Request<B>) {
        let Some(asks) = &self.asks else { return };
        asks.request.apply(request.headers_mut());
        self.change_target(asks.rewrite.as_ref(), &asks.matches, request);
        if let Some(backend) = &self.backend {
            backend.request.apply(request.headers_mut());
            self.change_target(backend.rewrite.as_ref(), &asks.matches, request);
        }
    }

    fn change_target<B>(&self, rewrite: Option<&Rewrite>, matches: &[Match], request: &mut Request<B>) {
        let Some(rewrite) = rewrite else { return };
        let mut uri = std::mem::take(request.uri_mut());
        filter::rewrite(rewrite, matches, &mut uri, request.headers_mut());
        *request.uri_mut() = uri;
    }

    /// Changes the answer's head.
    pub fn change_response(&self, headers: &mut HeaderMap) {
        let Some(asks) = &self.asks else { return };
        if let Some(backend) = &self.backend {
            backend.response.apply(headers);
        }
        asks.response.apply(headers);
        if let Some(cookie) = &self.cookie {
            headers.append(http::header::SET_COOKIE, cookie.clone());
        }
    }
}
