//! Packet programs on a link by the traffic control layer: the `clsact` queueing discipline, and one direct-action BPF
//! filter per direction, known by its name.
//!
//! Other people's filters, and a `clsact` that they need, stay. Loading programs is not done here.

use crate::{Connection, Error, error::Result, rtnl::Request};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage as Message,
    tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};
use std::{
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd},
};

const CLSACT: &str = "clsact";
/// First of all filters.
const PRIORITY: u16 = 1;
const ETH_P_ALL: u16 = 3;

/// Which packets of a link a filter sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Those that the link receives.
    Ingress,
    /// Those that it sends.
    Egress,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A BPF filter of ours that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    handle: TcHandle,
    priority: u16,
    /// Number of its program, as `bpftool prog` shows it; where the kernel says it.
    pub program_id: Option<u32>,
    /// Digest of its program's instructions.
    pub tag: Option<[u8; 8]>,
}

/// Puts `clsact` on a link that has none; true when it was put there. An `ingress` discipline in its place is another's
/// and an error.
pub fn ensure_clsact(connection: &mut Connection, link: u32) -> Result<bool> {
    let mut message = on(link, TcHandle::CLSACT);
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
    let operation = format!("put clsact on link {link} (CONFIG_NET_SCH_INGRESS)");
    match one(connection, Message::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL, operation) {
        Err(e) if e.errno() == Some(libc::EEXIST) => {}
        made => return made.map(|()| true),
    }
    match discipline(connection, link)?.as_deref() {
        Some(CLSACT) => Ok(false),
        other => {
            let other = other.unwrap_or("of a moment ago");
            let operation = format!(
                "put clsact on link {link}: the discipline {other:?} of somebody else is in its place (remove it, or, \
                 on a link of the node's own, run a kernel from 6.6 on, where it is not in the way)"
            );
            Err(Error::Refused { operation, cause: io::Error::from_raw_os_error(libc::EEXIST) })
        }
    }
}

/// Puts programs on a link by their names, as [`attach`] does, and `clsact` first where there is none: on a new link
/// without looking for what it cannot have.
pub fn attach_all(
    connection: &mut Connection,
    link: u32,
    programs: &[(Direction, &str, BorrowedFd<'_>)],
) -> Result<()> {
    let fresh = ensure_clsact(connection, link)?;
    if fresh {
        let requests = programs.iter().map(|(direction, name, program)| put(link, *direction, name, *program, None));
        return connection.execute(requests.collect())?.into_iter().collect();
    }
    programs.iter().try_for_each(|(direction, name, program)| attach(connection, link, *direction, name, *program))
}

/// Removes `clsact` from a link unless a filter is left in it; true when it was removed.
pub fn remove_clsact(connection: &mut Connection, link: u32) -> Result<bool> {
    if discipline(connection, link)?.as_deref() != Some(CLSACT) {
        return Ok(false);
    }
    for direction in [Direction::Ingress, Direction::Egress] {
        if !filters(connection, link, direction)?.is_empty() {
            return Ok(false);
        }
    }
    let mut message = on(link, TcHandle::CLSACT);
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
    gone(one(connection, Message::DelQueueDiscipline(message), 0, format!("remove clsact from link {link}")))
}

/// The filter of that name on a link, where there is one.
pub fn find(connection: &mut Connection, link: u32, direction: Direction, name: &str) -> Result<Option<Attached>> {
    Ok(filters(connection, link, direction)?.iter().find_map(|m| named(m, name)))
}

/// Puts a program on a link as a direct-action filter of that name, in place of one of the same name: then there is no
/// packet that neither of them sees. `clsact` must be there.
pub fn attach(
    connection: &mut Connection,
    link: u32,
    direction: Direction,
    name: &str,
    program: BorrowedFd<'_>,
) -> Result<()> {
    let ours = find(connection, link, direction, name)?;
    connection.execute(vec![put(link, direction, name, program, ours)])?.into_iter().collect()
}

/// Without a handle the kernel chooses one that nobody has; with ours it replaces ours.
fn put(link: u32, direction: Direction, name: &str, program: BorrowedFd<'_>, ours: Option<Attached>) -> Request {
    let fd = u32::try_from(program.as_raw_fd()).unwrap_or(u32::MAX); // an open descriptor is not negative
    let option = |o| TcOption::Bpf(o);
    let mut message = at(link, direction, ours);
    message.attributes.push(TcAttribute::Options(vec![
        option(TcFilterBpfOption::ProgFd(fd)),
        option(TcFilterBpfOption::ProgName(name.to_owned())),
        option(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    let flags = NLM_F_CREATE | if ours.is_some() { NLM_F_REPLACE } else { NLM_F_EXCL };
    let operation = format!("put filter {name} on {direction} of link {link} (CONFIG_NET_CLS_BPF)");
    Request { message: Message::NewTrafficFilter(message), flags, operation }
}

/// Removes the filters of that name; true when there was one.
pub fn detach(connection: &mut Connection, link: u32, direction: Direction, name: &str) -> Result<bool> {
    let ours: Vec<_> = filters(connection, link, direction)?.iter().filter_map(|m| named(m, name)).collect();
    let mut any = false;
    for attached in ours {
        let message = at(link, direction, Some(attached));
        let operation = format!("remove filter {name} from {direction} of link {link}");
        any |= gone(one(connection, Message::DelTrafficFilter(message), 0, operation))?;
    }
    Ok(any)
}

/// False where there was nothing to remove.
fn gone(outcome: Result<()>) -> Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(e) if [libc::ENOENT, libc::ENODEV].map(Some).contains(&e.errno()) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Kind of what is at the place of `clsact`.
fn discipline(connection: &mut Connection, link: u32) -> Result<Option<String>> {
    let all = connection.dump(Message::GetQueueDiscipline(on(link, TcHandle::UNSPEC)), "list queueing disciplines")?;
    Ok(all.into_iter().find_map(|m| match m {
        Message::NewQueueDiscipline(m) if is_of(&m, link) && m.header.parent == TcHandle::CLSACT => kind(&m),
        _ => None,
    }))
}

/// Everybody's filters on a link; none where no discipline is that could hold them.
fn filters(connection: &mut Connection, link: u32, direction: Direction) -> Result<Vec<TcMessage>> {
    let ask = Message::GetTrafficFilter(on(link, parent(direction)));
    let all = connection.dump(ask, &format!("list filters on {direction} of link {link}"))?;
    // The first answer per priority stands for the priority, without a filter's handle and options.
    let whole = |m: &TcMessage| m.attributes.iter().any(|a| matches!(a, TcAttribute::Options(_)));
    Ok(all
        .into_iter()
        .filter_map(|m| match m {
            Message::NewTrafficFilter(m) if is_of(&m, link) && whole(&m) => Some(m),
            _ => None,
        })
        .collect())
}

fn named(m: &TcMessage, name: &str) -> Option<Attached> {
    if kind(m).as_deref() != Some(TcFilterBpf::KIND) {
        return None;
    }
    let (mut ours, mut program_id, mut tag) = (false, None, None);
    let options = m.attributes.iter().filter_map(|a| if let TcAttribute::Options(o) = a { Some(o) } else { None });
    for option in options.flatten() {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(n)) => ours = n == name,
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program_id = Some(*id),
            TcOption::Bpf(TcFilterBpfOption::ProgTag(t)) => tag = Some(*t),
            _ => {}
        }
    }
    let priority = (m.header.info >> 16) as u16;
    ours.then_some(Attached { handle: m.header.handle, priority, program_id, tag })
}

fn kind(m: &TcMessage) -> Option<String> {
    m.attributes.iter().find_map(|a| if let TcAttribute::Kind(k) = a { Some(k.clone()) } else { None })
}

fn is_of(m: &TcMessage, link: u32) -> bool {
    i64::from(m.header.index) == i64::from(link)
}

fn parent(direction: Direction) -> TcHandle {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    TcHandle { major: u16::MAX, minor }
}

fn on(link: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(link).unwrap_or(0); // the kernel's indexes are positive integers
    message.header.parent = parent;
    message
}

fn at(link: u32, direction: Direction, attached: Option<Attached>) -> TcMessage {
    let mut message = on(link, parent(direction));
    let priority = attached.map_or(PRIORITY, |a| a.priority);
    message.header.info = u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be());
    message.header.handle = attached.map_or(TcHandle::UNSPEC, |a| a.handle);
    message.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
    message
}

fn one(connection: &mut Connection, message: Message, flags: u16, operation: String) -> Result<()> {
    let answers = connection.execute(vec![Request { message, flags, operation }])?;
    answers.into_iter().collect::<Result<Vec<()>>>().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lab, link,
        ns::{Unshare, unshare},
    };
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};

    /// `r0 = verdict; exit`, as `struct bpf_insn`s.
    fn program(verdict: u32) -> OwnedFd {
        const BPF_PROG_LOAD: libc::c_long = 5;
        const SCHED_CLS: u32 = 3;
        let code: [u64; 2] = [0xb7 | u64::from(verdict) << 32, 0x95];
        let license = c"GPL";
        /// Head of `union bpf_attr` for BPF_PROG_LOAD.
        #[repr(C)]
        struct Load {
            kind: u32,
            count: u32,
            code: u64,
            license: u64,
            rest: [u64; 12],
        }
        let code_at = code.as_ptr() as u64;
        let load = Load { kind: SCHED_CLS, count: 2, code: code_at, license: license.as_ptr() as u64, rest: [0; 12] };
        // SAFETY: the kernel reads `load` and what it points to, all alive here; the descriptor it answers is new.
        unsafe {
            let fd = libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>());
            assert!(fd >= 0, "load a program: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd as i32)
        }
    }

    /// In a namespace of its own: the thread ends with the test.
    #[test]
    fn filters_come_are_replaced_and_go_and_others_stay() {
        unshare(Unshare { net: true, ..Unshare::default() }).expect("needs root");
        let here = crate::Netns::current().expect("current");
        lab::bridge(&here, "br0", "192.168.7.1".parse().expect("ip"), 24).expect("bridge");
        let mut connection = Connection::open().expect("connection");
        let c = &mut connection;
        let link = link::find(c, "br0").expect("find").expect("made").index;
        let (first, second) = (program(0), program(2));

        attach(c, link, Direction::Ingress, "a", first.as_fd()).expect_err("no clsact yet");
        assert_eq!(find(c, link, Direction::Ingress, "a").expect("find"), None);
        assert!(!remove_clsact(c, link).expect("nothing to remove"));
        assert!(ensure_clsact(c, link).expect("clsact") && !ensure_clsact(c, link).expect("again"));
        let nothing = std::fs::File::open("/dev/null").expect("open");
        attach(c, link, Direction::Ingress, "a", nothing.as_fd()).expect_err("not a program");

        for direction in [Direction::Ingress, Direction::Egress] {
            attach(c, link, direction, "other", first.as_fd()).expect("another's");
            let other = find(c, link, direction, "other").expect("find").expect("there");
            attach(c, link, direction, "a", first.as_fd()).expect("attach");
            let was = find(c, link, direction, "a").expect("find").expect("there");
            attach(c, link, direction, "a", second.as_fd()).expect("replace");
            let now = find(c, link, direction, "a").expect("find").expect("there");
            assert!(was.program_id.is_some() && was.program_id != now.program_id, "{was:?} {now:?}");
            assert!(was.tag.is_some() && was.tag != now.tag && was.handle == now.handle, "{was:?} {now:?}");
            assert_eq!(find(c, link, direction, "other").expect("find"), Some(other), "untouched");
            assert!(detach(c, link, direction, "a").expect("detach"));
            assert!(!detach(c, link, direction, "a").expect("again"));
            assert!(!remove_clsact(c, link).expect("look"), "another's filter needs it");
            assert!(detach(c, link, direction, "other").expect("detach"));
        }
        assert!(remove_clsact(c, link).expect("remove"));
        assert_eq!(find(c, link, Direction::Egress, "a").expect("find"), None);
        for program in [&first, &second] {
            let both = [Direction::Ingress, Direction::Egress].map(|d| (d, "a", program.as_fd()));
            attach_all(c, link, &both).expect("on a link without, and on one with");
            for direction in [Direction::Ingress, Direction::Egress] {
                assert_eq!(filters(c, link, direction).expect("list").len(), 1, "replaced, not added");
            }
        }
    }

    #[test]
    fn another_discipline_in_the_place_is_named() {
        unshare(Unshare { net: true, ..Unshare::default() }).expect("needs root");
        let here = crate::Netns::current().expect("current");
        lab::bridge(&here, "br0", "192.168.7.1".parse().expect("ip"), 24).expect("bridge");
        let mut c = Connection::open().expect("connection");
        let link = link::find(&mut c, "br0").expect("find").expect("made").index;
        let mut message = on(link, TcHandle::INGRESS);
        message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        message.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
        one(&mut c, Message::NewQueueDiscipline(message), NLM_F_CREATE, "put ingress".to_owned()).expect("ingress");
        let error = ensure_clsact(&mut c, link).expect_err("in the way");
        assert!(error.to_string().contains("\"ingress\""), "{error}");
    }
}
