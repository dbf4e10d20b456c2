//! The store keeps what it acknowledged: on a medium that loses or reorders everything not yet synced, and when the
//! process is killed.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redb::StorageBackend;
use sluice_control::store::{EmbeddedStore, ListQuery, Op, Store, StoreError, Txn, TxnOutcome, WatchItem};

/// A disk as it really is: writes sit in a cache until synced, and a power cut keeps any part of them, whole or torn.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<DiskState>>);

#[derive(Debug, Default)]
struct DiskState {
    durable: Vec<u8>,
    cached: Vec<u8>,
    unsynced: Vec<Write>,
    /// Bytes that may still be written before the power goes.
    fuse: Option<usize>,
}

#[derive(Debug, Clone)]
enum Write {
    Bytes(u64, Vec<u8>),
    Length(u64),
}

fn apply(image: &mut Vec<u8>, write: &Write) {
    match write {
        Write::Length(length) => image.resize(usize::try_from(*length).expect("fits"), 0),
        Write::Bytes(offset, bytes) => {
            let start = usize::try_from(*offset).expect("fits");
            if image.len() < start + bytes.len() {
                image.resize(start + bytes.len(), 0);
            }
            image[start..start + bytes.len()].copy_from_slice(bytes);
        }
    }
}

impl DiskState {
    fn spend(&mut self, bytes: usize) -> io::Result<()> {
        match &mut self.fuse {
            Some(left) if *left < bytes => Err(io::Error::other("power is gone")),
            Some(left) => {
                *left -= bytes;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Disk {
    /// The power goes after about so many more bytes.
    fn light_fuse(&self, bytes: usize) {
        self.0.lock().expect("no panic").fuse = Some(bytes);
    }

    /// What is on the disk when the power is back: all that was synced, and of the rest any part in any order.
    fn after_power_cut(&self, rng: &mut StdRng) -> Disk {
        let state = self.0.lock().expect("no panic");
        let mut image = state.durable.clone();
        let mut rest = state.unsynced.clone();
        if rng.random_bool(0.5) {
            for index in (1..rest.len()).rev() {
                rest.swap(index, rng.random_range(0..=index));
            }
        }
        let kept = rng.random_range(0.0..=1.0);
        for write in rest.iter().filter(|_| rng.random_bool(kept)).cloned().collect::<Vec<_>>() {
            match write {
                // A write reaches the medium in sectors.
                Write::Bytes(offset, bytes) if rng.random_bool(0.2) => {
                    for (index, sector) in
                        bytes.chunks(512).enumerate().filter(|_| rng.random_bool(0.5)).collect::<Vec<_>>()
                    {
                        apply(&mut image, &Write::Bytes(offset + 512 * index as u64, sector.to_vec()));
                    }
                }
                Write::Length(length) if (usize::try_from(length).expect("fits")) < image.len() => {}
                write => apply(&mut image, &write),
            }
        }
        // The length is metadata that was written with what needed it.
        let longest =
            rest.iter().filter_map(|w| if let Write::Length(l) = w { usize::try_from(*l).ok() } else { None }).max();
        image.resize(image.len().max(longest.unwrap_or(0)), 0);
        let cached = image.clone();
        Disk(Arc::new(Mutex::new(DiskState { durable: image, cached, ..DiskState::default() })))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.0.lock().expect("no panic").cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let state = self.0.lock().expect("no panic");
        let start = usize::try_from(offset).expect("fits");
        let bytes = state.cached.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        let mut state = self.0.lock().expect("no panic");
        state.spend(1)?;
        apply(&mut state.cached, &Write::Length(len));
        state.unsynced.push(Write::Length(len));
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut state = self.0.lock().expect("no panic");
        state.spend(1)?;
        state.durable = state.cached.clone();
        state.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let mut state = self.0.lock().expect("no panic");
        state.spend(data.len())?;
        let write = Write::Bytes(offset, data.to_vec());
        apply(&mut state.cached, &write);
        state.unsynced.push(write);
        Ok(())
    }
}

/// What was acknowledged: revision and value (`None` = deleted) of each key; and what was asked but never answered.
#[derive(Default)]
struct Model {
    acknowledged: BTreeMap<String, (u64, Option<Vec<u8>>)>,
    unanswered: BTreeMap<String, Vec<Option<Vec<u8>>>>,
    revision: u64,
}

impl Model {
    async fn check(&mut self, store: &EmbeddedStore) {
        assert!(store.revision() >= self.revision, "revision {} went back to {}", self.revision, store.revision());
        self.revision = store.revision();
        let listing = store.list(ListQuery::default()).await.expect("lists");
        let found: BTreeMap<_, _> = listing.items.into_iter().map(|kv| (kv.key.clone(), kv)).collect();
        let keys: Vec<String> = self.acknowledged.keys().chain(self.unanswered.keys()).cloned().collect();
        for key in keys {
            let now = found.get(&key).map(|kv| kv.value.to_vec());
            let (revision, expected) = self.acknowledged.get(&key).cloned().unwrap_or((0, None));
            let maybe = self.unanswered.get(&key).is_some_and(|values| values.contains(&now));
            assert!(now == expected || maybe, "{key}: acknowledged at {revision} {expected:?}, found {now:?}");
            self.acknowledged.insert(key.clone(), (found.get(&key).map_or(revision, |kv| kv.mod_revision), now));
        }
        for key in found.keys() {
            assert!(self.acknowledged.contains_key(key), "{key} was never written");
        }
        self.unanswered.clear();
    }

    async fn write(&mut self, store: &EmbeddedStore, rng: &mut StdRng) -> Result<(), StoreError> {
        let mut txn = Txn::new();
        let mut wanted = Vec::new();
        for _ in 0..rng.random_range(1..4) {
            let key = format!("/k/{}", rng.random_range(0..20));
            if wanted.iter().any(|(known, _)| *known == key) {
                continue;
            }
            let value = rng.random_bool(0.8).then(|| vec![rng.random::<u8>(); rng.random_range(1..2_000)]);
            txn = txn.then(match &value {
                Some(value) => Op::put(key.clone(), value.clone()),
                None => Op::delete(key.clone()),
            });
            wanted.push((key, value));
        }
        match store.txn(txn).await {
            Ok(TxnOutcome::Committed { revision }) => {
                for (key, value) in wanted {
                    self.acknowledged.insert(key, (revision, value));
                }
                self.revision = self.revision.max(revision);
                Ok(())
            }
            Ok(conflict) => panic!("no condition was set: {conflict:?}"),
            Err(error) => {
                for (key, value) in wanted {
                    self.unanswered.entry(key).or_default().push(value);
                }
                Err(error)
            }
        }
    }
}

#[tokio::test]
async fn a_thousand_power_cuts_lose_nothing_acknowledged() {
    let mut rng = StdRng::seed_from_u64(11);
    let mut disk = Disk::default();
    let mut model = Model::default();
    let mut epoch = None;
    for cut in 0..1_000 {
        let store = EmbeddedStore::with_backend(disk.clone()).unwrap_or_else(|e| panic!("open after cut {cut}: {e}"));
        assert_eq!(*epoch.get_or_insert_with(|| store.epoch().to_owned()), store.epoch());
        model.check(&store).await;
        disk.light_fuse(rng.random_range(0..300_000));
        for _ in 0..20 {
            if model.write(&store, &mut rng).await.is_err() {
                break;
            }
        }
        if rng.random_bool(0.1) {
            let _ = store.compact(store.revision()).await;
        }
        // Everything after this is lost with the power, what closing writes included.
        disk.light_fuse(0);
        drop(store);
        disk = disk.after_power_cut(&mut rng);
    }
    assert!(model.revision > 1_000, "{}", model.revision);
}

fn open(dir: &tempfile::TempDir) -> EmbeddedStore {
    EmbeddedStore::open(&dir.path().join("store.redb")).expect("opens")
}

#[tokio::test]
async fn transactions_compare_and_lists_are_consistent() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(&dir);
    let made = store.txn(Txn::new().when("/a/1", 0).then(Op::put("/a/1", "x")).then(Op::put("/a/2", "y"))).await;
    assert_eq!(made.expect("answers"), TxnOutcome::Committed { revision: 1 });
    let again = store.txn(Txn::new().when("/a/1", 0).then(Op::put("/a/1", "z"))).await.expect("answers");
    assert_eq!(again, TxnOutcome::Conflict { key: "/a/1".to_owned(), mod_revision: 1 });
    store.txn(Txn::new().when("/a/1", 1).then(Op::put("/a/1", "z")).then(Op::delete("/a/2"))).await.expect("answers");
    store.txn(Txn::new().then(Op::put("/a/3", "w")).then(Op::put("/b/1", "v"))).await.expect("answers");
    let keys = async |query: ListQuery| {
        let listing = store.list(query).await.expect("lists");
        let text = |kv: &sluice_control::store::KeyValue| format!("{}={}", kv.key, String::from_utf8_lossy(&kv.value));
        (listing.items.iter().map(text).collect::<Vec<_>>(), listing.more, listing.remaining)
    };
    let all = |revision| ListQuery { prefix: "/a/".to_owned(), revision, ..ListQuery::default() };
    assert_eq!(keys(all(None)).await.0, ["/a/1=z", "/a/3=w"]);
    assert_eq!(keys(all(Some(1))).await.0, ["/a/1=x", "/a/2=y"]);
    let page = ListQuery { limit: 1, ..all(Some(1)) };
    assert_eq!(keys(page.clone()).await, (vec!["/a/1=x".to_owned()], true, 1));
    assert_eq!(keys(ListQuery { after: Some("/a/1".to_owned()), ..page }).await, (vec!["/a/2=y".to_owned()], false, 0));
    assert!(matches!(store.list(all(Some(9))).await, Err(StoreError::Future { .. })));
}

#[tokio::test]
async fn a_watch_replays_goes_on_and_expires() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(&dir);
    for index in 0..5 {
        store.txn(Txn::new().then(Op::put("/a/1", format!("{index}")))).await.expect("answers");
    }
    let mut watch = store.watch("/a/", 2).await.expect("watches");
    store.txn(Txn::new().then(Op::put("/b/1", "other"))).await.expect("answers");
    store.txn(Txn::new().then(Op::delete("/a/1"))).await.expect("answers");
    store.request_progress();
    let mut seen = Vec::new();
    loop {
        match watch.next().await.expect("open").expect("no error") {
            WatchItem::Event(event) => seen.push((event.revision, event.value.is_some(), event.previous.is_some())),
            WatchItem::Progress(revision) => {
                assert_eq!(revision, 7);
                break;
            }
        }
    }
    assert_eq!(seen, [(3, true, true), (4, true, true), (5, true, true), (7, false, true)]);
    store.compact(6).await.expect("compacts");
    assert!(matches!(store.watch("/a/", 2).await, Err(StoreError::Compacted { .. })));
    assert!(store.watch("/a/", 6).await.is_ok());
    let old = ListQuery { prefix: "/b/".to_owned(), revision: Some(5), ..ListQuery::default() };
    assert!(matches!(store.list(old).await, Err(StoreError::Compacted { .. })));
    assert_eq!(
        store.list(ListQuery { prefix: "/".to_owned(), ..ListQuery::default() }).await.expect("lists").items.len(),
        1
    );
}

#[tokio::test]
async fn a_slow_watcher_is_told_and_costs_nobody_else() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Arc::new(open(&dir));
    let mut slow = store.watch("/a/", 0).await.expect("watches");
    let writers: Vec<_> = (0..64)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                for index in 0..600 {
                    store
                        .txn(Txn::new().then(Op::put(format!("/a/{writer}"), format!("{index}"))))
                        .await
                        .expect("answers");
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("no panic");
    }
    let mut last = None;
    while let Some(item) = slow.next().await {
        last = Some(item);
    }
    assert!(matches!(last, Some(Err(StoreError::Lagged { .. }))), "{last:?}");
}

#[tokio::test]
async fn what_has_a_time_to_live_goes() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(&dir);
    let put = |ttl_s| Op::Put { key: "/a/1".to_owned(), value: "x".into(), ttl_s };
    store.txn(Txn::new().then(put(Some(0)))).await.expect("answers");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while store.get("/a/1").await.expect("answers").is_some() {
        assert!(tokio::time::Instant::now() < deadline, "it stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Not a test of its own: the process that the next one kills. Prints each acknowledged number.
#[tokio::test]
async fn writer_to_be_killed() {
    let Ok(path) = std::env::var("SLUICE_TEST_STORE") else { return };
    let store = EmbeddedStore::open(std::path::Path::new(&path)).expect("opens");
    let kv = store.get("/n").await.expect("answers");
    let mut number: u64 = kv.map_or(0, |kv| String::from_utf8_lossy(&kv.value).parse().expect("a number"));
    loop {
        number += 1;
        let outcome = store.txn(Txn::new().then(Op::put("/n", number.to_string()))).await.expect("answers");
        let TxnOutcome::Committed { revision } = outcome else { panic!("no condition was set") };
        println!("acknowledged {number} {revision}");
    }
}

#[test]
fn twenty_kills_lose_nothing_acknowledged() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.redb");
    let (mut last, mut last_revision) = (0_u64, 0_u64);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for kill in 0..20 {
        let mut child = std::process::Command::new(std::env::current_exe().expect("our own path"))
            .args(["writer_to_be_killed", "--exact", "--nocapture"])
            .env("SLUICE_TEST_STORE", &path)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut seen = 0;
        for line in lines.map_while(Result::ok) {
            let Some(at) = line.find("acknowledged ") else { continue };
            let mut numbers = line[at..].split(' ').skip(1).map(|n| n.parse::<u64>().expect("a number"));
            (last, last_revision) = (numbers.next().expect("one"), numbers.next().expect("two"));
            seen += 1;
            if seen == 5 + kill * 3 {
                child.kill().expect("kills");
            }
        }
        child.wait().expect("ends");
        let store = EmbeddedStore::open(&path).expect("opens after a kill");
        let kv = runtime.block_on(store.get("/n")).expect("answers").expect("is there");
        let stored: u64 = String::from_utf8_lossy(&kv.value).parse().expect("a number");
        assert!(stored >= last && store.revision() >= last_revision, "kill {kill}: {stored} after {last}");
    }
    assert!(last >= 20 * 5);
}
