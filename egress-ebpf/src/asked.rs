//! Who may be asked for names, and which sockets asked: the `RESOLVERS` and `NETNS` maps, and the `ASKED`, `QUESTIONED` and
//! `STREAMS` storage of sockets.
//!
//! An answer is believed on a socket that asked its sender, by an address that is in the policy, from a network namespace in
//! which that address is who it seems to be.

use aya_ebpf::{
    bindings::__sk_buff,
    btf_maps::{HashMap, SkStorage},
    helpers::generated::{bpf_get_netns_cookie, bpf_setsockopt, bpf_sk_fullsock, bpf_sk_storage_get},
    macros::btf_map,
    programs::SockAddrContext,
};
use egress_common::{
    Address, Asked, DNS_PORT, Flow, MAX_NETNS, MAX_RESOLVERS, Place, Protocol, Queries, Questioner, ResolverKey,
    SHARED, Stream, queries, serves_dns,
};

use crate::{
    events,
    rules::Maps,
    workloads::{self, NO_PREALLOC},
};

#[btf_map]
static RESOLVERS: HashMap<ResolverKey, u32, { MAX_RESOLVERS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static NETNS: HashMap<u64, u32, { MAX_NETNS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static ASKED: SkStorage<Asked> = SkStorage::new();

/// `IPPROTO_TCP` of `linux/in.h`, as a level of options, and `TCP_USER_TIMEOUT` of `linux/tcp.h`, in milliseconds.
const IPPROTO_TCP: i32 = 6;
const TCP_USER_TIMEOUT: i32 = 18;
/// How long a connection may try to send what is refused.
const PATIENCE: u32 = 3_000;

/// Who asked last, where questions are judged.
#[btf_map]
static QUESTIONED: SkStorage<Questioner> = SkStorage::new();

#[btf_map]
static STREAMS: SkStorage<Stream> = SkStorage::new();

/// What becomes of questions of a socket that is about to ask a server of DNS. It is marked, where they are judged; where they can be
/// refused and that fails, it may not ask.
#[inline(always)]
pub(crate) fn question(ctx: &SockAddrContext, flow: &Flow) -> Result<Queries, ()> {
    if flow.port != DNS_PORT || !flow.protocol.is_judged() {
        return Ok(Queries::Any);
    }
    let what = queries(&Maps::of(ctx), flow.place);
    if what == Queries::Any {
        return Ok(what);
    }
    // SAFETY: as in `peers`; where the socket is not locked, of two users who ask by it at a time both are judged as one.
    match unsafe { QUESTIONED.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        Some(questioner) => *questioner = Questioner::new(events::current(), what == Queries::Named),
        None if what == Queries::Named => return Err(()),
        None => {}
    }
    Ok(what)
}

/// Lets a connection fail that cannot send what was written to it: the kernel would try for a quarter of an hour to send a
/// question that is refused. From the hooks of `connect` alone.
#[inline(always)]
pub(crate) fn give_up_soon(ctx: &SockAddrContext) {
    let mut patience = PATIENCE;
    // SAFETY: the helper takes a valid context and a value of four bytes. Where it fails, it takes longer.
    unsafe { bpf_setsockopt(ctx.sock_addr.cast(), IPPROTO_TCP, TCP_USER_TIMEOUT, (&raw mut patience).cast(), 4) };
}

/// Marks a socket that is about to ask a resolver.
#[inline(always)]
pub(crate) fn mark(ctx: &SockAddrContext, flow: &Flow) {
    let Place::Scope(scope) = flow.place else { return };
    if flow.port != DNS_PORT || !flow.protocol.is_judged() {
        return;
    }
    // Whom one that resolves for the whole host asks is its own business.
    let workload = if serves_dns(&Maps::of(ctx), scope) {
        SHARED
    } else {
        // SAFETY: an element is removed only after a grace period in which nothing named its scope.
        if unsafe { RESOLVERS.get(ResolverKey::new(scope, flow.address)) }.is_none() {
            return;
        }
        workloads::current_workload()
    };
    if !is_in_known_netns(ctx) {
        return;
    }
    // SAFETY: as in `peers`; where the socket is not locked, see `Asked`.
    if let Some(asked) = unsafe { ASKED.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        asked.ask(workload, flow.address);
    }
    if flow.protocol == Protocol::TCP {
        // SAFETY: as above; the socket is not connected, so nothing is received.
        if let Some(stream) = unsafe { STREAMS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
            stream.reset();
        }
    }
}

/// Whether the socket is of a network namespace in which addresses are whose they seem to be.
#[inline(always)]
pub(crate) fn is_in_known_netns(ctx: &SockAddrContext) -> bool {
    // SAFETY: the helper takes a valid context and returns a number.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    // SAFETY: the value is not read.
    unsafe { NETNS.get(cookie) }.is_some()
}

/// For whom the socket of a packet asked its sender; `None` if it did not.
#[inline(always)]
pub(crate) fn by(skb: *mut __sk_buff, sender: Address) -> Option<u64> {
    let asked: *mut Asked = storage(skb, (&raw const ASKED).cast());
    // SAFETY: the storage of a socket outlives the programs that run for it; for who writes meanwhile, see `Asked`.
    let asked = unsafe { asked.as_ref() }?;
    asked.has(sender).then(|| asked.workload())
}

/// Who asked last by the socket of a packet, where questions are judged; `None` if nobody has asked by it.
#[inline(always)]
pub(crate) fn questioner<'a>(skb: *mut __sk_buff) -> Option<&'a mut Questioner> {
    let questioner: *mut Questioner = storage(skb, (&raw const QUESTIONED).cast());
    // SAFETY: as in `by`.
    unsafe { questioner.as_mut() }
}

/// The stream that the socket of a packet receives.
#[inline(always)]
pub(crate) fn stream<'a>(skb: *mut __sk_buff) -> Option<&'a mut Stream> {
    let stream: *mut Stream = storage(skb, (&raw const STREAMS).cast());
    // SAFETY: as in `by`. Packets of one connection are received one after the other, under the lock of their socket or on
    // one processor; where they are not, what is learnt is at worst another answer of the same resolver.
    unsafe { stream.as_mut() }
}

#[inline(always)]
fn storage<T>(skb: *mut __sk_buff, map: *const core::ffi::c_void) -> *mut T {
    // SAFETY: the context is valid, and the verifier checks each access.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    if socket.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: the helper takes a socket that the kernel gave, and tells whether it is a full one.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: a map of the storage of sockets, whose values are of the type, as both callers know, and a socket.
    unsafe { bpf_sk_storage_get(map.cast_mut().cast(), socket.cast(), core::ptr::null_mut(), 0) }.cast()
}
