//! What was learnt of names: the `NAMES` map, and which names policies know, the `NAME_IDS` trie.
//!
//! The trie is exchanged as a whole, like everything that policies say. What was learnt is a fact, which no policy changes.

use core::ptr;

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    btf_maps::{ArrayOfMaps, HashMap, LpmTrie, LruHashMap, lpm_trie::Key},
    macros::btf_map,
};
use egress_common::{
    Address, Claim, Claims, FactKey, Flow, KEY_BYTES, Lesson, MAX_FACTS, MAX_HOSTS, MAX_LEARNERS, MOST_CLAIMS, NameId,
    NameKey, NamedRules, Place, Protocol, RuleId, SHARED, View, rule_by_name,
};

use crate::{
    clock, meta,
    rules::Maps,
    stats,
    workloads::{self, NO_PREALLOC},
};

/// `EEXIST` of `asm-generic/errno-base.h`.
const EEXIST: i32 = 17;

type Ids = LpmTrie<[u8; KEY_BYTES], u32, 1>;

#[btf_map]
static NAME_IDS: ArrayOfMaps<Ids, 1> = ArrayOfMaps::new();

#[btf_map]
static NAMES: HashMap<FactKey, Claims, { MAX_FACTS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static HOSTS: LruHashMap<FactKey, NameKey, { MAX_HOSTS as usize }> = LruHashMap::new();

#[btf_map]
static QUOTAS: HashMap<u64, u32, { MAX_LEARNERS as usize }, NO_PREALLOC> = HashMap::new();

/// The closest name or pattern that a policy knows.
#[inline(always)]
pub(crate) fn id(key: &NameKey) -> Option<NameId> {
    // SAFETY: both are `repr(C)` with a `u32` length before as many bytes, and `Key` asks for no alignment.
    let key = unsafe { &*(&raw const *key).cast::<Key<[u8; KEY_BYTES]>>() };
    NameId::new(*NAME_IDS.get(0)?.get(key)?)
}

/// Remembers what a workload asked for when it got an address, for whoever reads denials.
#[inline(always)]
pub(crate) fn tell(workload: u64, address: Address, asked: &NameKey) {
    // Where there is no room, a denial tells no name.
    let _ = HOSTS.insert(FactKey::new(workload, address), asked, 0);
}

/// Remembers that an address was an answer to a workload.
#[inline(always)]
pub(crate) fn learn(workload: u64, address: Address, name: NameId, ttl: u32) {
    let lesson = if address.reserved().is_some() {
        Lesson::Reserved
    } else {
        let now = clock::seconds();
        let claim = Claim::new(name, meta::lifetime().end(ttl, now));
        put(&FactKey::new(workload, address.judged()), claim, now)
    };
    stats::answered(lesson);
}

#[inline(always)]
fn put(key: &FactKey, claim: Claim, now: u32) -> Lesson {
    if let Some(claims) = NAMES.get_ptr_mut(key) {
        return add(claims, claim, now);
    }
    let count = QUOTAS.get_ptr_mut(key.workload());
    // SAFETY: a pointer into the map, whose elements outlive the program. A count that is lost to another processor is found
    // by the agent, which counts again.
    if count.is_some_and(|count| unsafe { ptr::read_volatile(count) } >= meta::quota()) {
        return Lesson::Quota;
    }
    match NAMES.insert(key, Claims::only(claim), BPF_NOEXIST.into()) {
        Ok(()) => {}
        Err(error) if error == -EEXIST => {
            return match NAMES.get_ptr_mut(key) {
                Some(claims) => add(claims, claim, now),
                None => Lesson::NoRoom,
            };
        }
        Err(_) => return Lesson::NoRoom,
    }
    match count {
        // SAFETY: as above.
        Some(count) => unsafe { ptr::write_volatile(count, ptr::read_volatile(count).wrapping_add(1)) },
        // Where there is no room for it, nobody counts; the agent will.
        None => drop(QUOTAS.insert(key.workload(), 1, 0)),
    }
    Lesson::Learnt
}

/// Adds a claim to those that others may be reading: one word at a time.
#[inline(always)]
fn add(claims: *mut Claims, claim: Claim, now: u32) -> Lesson {
    let place = read(claims).place(claim, now);
    // SAFETY: a pointer into the map, to one of as many words; its elements outlive the program.
    unsafe {
        let word = claims.cast::<u64>().add(place.index & (MOST_CLAIMS - 1));
        ptr::write_volatile(word, claim.over(place.old).word());
    }
    if place.is_crowded { Lesson::Crowded } else { Lesson::Learnt }
}

#[inline(always)]
fn read(claims: *const Claims) -> Claims {
    let words = claims.cast::<u64>();
    // SAFETY: as in `add`.
    unsafe {
        Claims::from_words([
            ptr::read_volatile(words),
            ptr::read_volatile(words.add(1)),
            ptr::read_volatile(words.add(2)),
            ptr::read_volatile(words.add(3)),
        ])
    }
}

impl NamedRules for Maps<'_> {
    #[inline(always)]
    fn claims(&self, flow: &Flow, workload: u64) -> (Claims, u32) {
        let key = FactKey::new(workload, flow.address.judged());
        let claims = match NAMES.get_ptr(key) {
            Some(claims) => read(claims),
            None => Claims::from_words([0; MOST_CLAIMS]),
        };
        (claims, clock::seconds())
    }
}

/// [`rule_by_name`] for the current task.
#[inline(always)]
pub(crate) fn allows(view: View, flow: &Flow) -> Option<RuleId> {
    let [a, b, c, d] = flow.address.network_words();
    let word = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    let asked = u64::from(view.index()) << 32 | u64::from(flow.protocol.number()) << 16 | u64::from(flow.port);
    let by = |workload| RuleId::from_field(allowed_by_name(asked, word(a, b), word(c, d), workload));
    match by(workloads::current_workload()) {
        None => by(SHARED),
        found => found,
    }
}

/// Verified once as a function of its own: few flows get here. 0 is no rule.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "each number is taken apart as it was put together")]
extern "C" fn allowed_by_name(asked: u64, high: u64, low: u64, workload: u64) -> u32 {
    let address = Address::from_network_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]);
    let protocol = Protocol::from_kernel(asked as u32 >> 16);
    let flow = Flow { place: Place::Unknown, protocol, address, port: asked as u16 };
    match rule_by_name(&Maps::WITHOUT_SOCKET, View::new((asked >> 32) as u32), &flow, workload) {
        Some(rule) => rule.0.get(),
        None => 0,
    }
}
