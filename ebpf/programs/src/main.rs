//! The programs of the kernel side, one entry point per hook: each reads its context, asks `balance`, `capture` or
//! `steer` for a verdict, and turns the verdict into the hook's answer. Nothing is decided here.
#![no_std]
#![no_main]

mod balance;
mod capture;
mod connections;
mod icmp;
mod maps;
mod neighbour;
mod packet;
mod route;
mod steer;
mod told;
mod work;
mod xdp;

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::bpf_set_retval,
    macros::{cgroup_sock, cgroup_sock_addr, classifier, sk_lookup, xdp},
    programs::{SkLookupContext, SockAddrContext, SockContext, TcContext, XdpContext},
};
use balance::{Answer, Dial, Verdict};
use core::ptr;
use sluice_ebpf_common::Addr;

/// Whether the kernel knows bpf_set_retval (5.18). The loader sets it; read-only data lets the verifier drop the call
/// where it is 0, and the refusal is then EPERM.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u8 = 1;

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;

fn refuse() -> i32 {
    // SAFETY: a plain read of the program's own read-only data; volatile, else the compiler folds the 1 above.
    if unsafe { ptr::read_volatile(&raw const HAS_SET_RETVAL) } == 1 {
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    DENY
}

#[inline(always)]
fn dial4(a: &bpf_sock_addr) -> Dial {
    Dial { addr: Addr::from_v4(a.user_ip4), port_be: a.user_port as u16 }
}

/// An AF_INET6 socket that dials ::ffff:a.b.c.d comes this way too, and is the same [`Dial`] as over AF_INET.
#[inline(always)]
fn dial6(a: &bpf_sock_addr) -> Dial {
    let words = [a.user_ip6[0], a.user_ip6[1], a.user_ip6[2], a.user_ip6[3]];
    Dial { addr: Addr { words }, port_be: a.user_port as u16 }
}

#[inline(always)]
fn answer4(a: &mut bpf_sock_addr, verdict: Verdict) -> i32 {
    match verdict.answer {
        Answer::Leave => ALLOW,
        Answer::Refuse => refuse(),
        Answer::Deny => DENY,
        Answer::Replace => {
            let to = verdict.to;
            a.user_ip4 = to.addr.words[3];
            a.user_port = to.port_be as u32;
            ALLOW
        }
    }
}

#[inline(always)]
fn answer6(a: &mut bpf_sock_addr, verdict: Verdict) -> i32 {
    match verdict.answer {
        Answer::Leave => ALLOW,
        Answer::Refuse => refuse(),
        Answer::Deny => DENY,
        Answer::Replace => {
            let to = verdict.to;
            a.user_ip6[0] = to.addr.words[0];
            a.user_ip6[1] = to.addr.words[1];
            a.user_ip6[2] = to.addr.words[2];
            a.user_ip6[3] = to.addr.words[3];
            a.user_port = to.port_be as u32;
            ALLOW
        }
    }
}

macro_rules! sock_addr_programs {
    ($($hook:ident: $dial:ident, $decide:path, $answer:ident;)*) => { $(
        #[cgroup_sock_addr($hook)]
        pub fn $hook(ctx: SockAddrContext) -> i32 {
            // SAFETY: the kernel passes a valid context that nobody else touches during the call.
            let a = unsafe { &mut *ctx.sock_addr };
            let verdict = $decide(&ctx, $dial(a));
            $answer(a, verdict)
        }
    )* };
}

sock_addr_programs! {
    connect4: dial4, capture::connect, answer4;
    connect6: dial6, capture::connect, answer6;
    sendmsg4: dial4, balance::sendmsg, answer4;
    sendmsg6: dial6, balance::sendmsg, answer6;
    recvmsg4: dial4, balance::recvmsg, answer4;
    recvmsg6: dial6, balance::recvmsg, answer6;
    getpeername4: dial4, balance::getpeername, answer4;
    getpeername6: dial6, balance::getpeername, answer6;
}

/// A socket that is closed.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    balance::released(&ctx);
    ALLOW
}

macro_rules! packet_programs {
    ($($name:ident: $decide:path;)*) => { $(
        #[classifier]
        pub fn $name(ctx: TcContext) -> i32 {
            $decide(packet::Skb { raw: ctx.skb.skb })
        }
    )* };
}

packet_programs! {
    from_pod: route::from_pod;
    from_wire: route::from_wire;
    from_host: route::from_host;
}

#[xdp(frags)]
pub fn from_wire_xdp(ctx: XdpContext) -> u32 {
    xdp::forward(packet::Frame { raw: ctx.ctx })
}

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

#[sk_lookup]
pub fn steer_pod(ctx: SkLookupContext) -> u32 {
    if steer::admit(&ctx) { SK_PASS } else { SK_DROP }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
