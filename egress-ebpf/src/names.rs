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
    Account, Address, COMMON, COMMON_FACTS, Claim, Claims, FactKey, Fit, Flow, KEY_BYTES, Lesson, MAX_FACTS, MAX_HOSTS,
    MAX_LEARNERS, MOST_CLAIMS, NameId, NameKey, NamedRules, Place, Protocol, RuleId, SHARED, View, rule_by_name,
};

use crate::{
    atomic, clock,
    context::{halves, joined},
    meta,
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
static QUOTAS: HashMap<u64, Account, { MAX_LEARNERS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static FORGOTTEN: HashMap<u64, u64, { MAX_LEARNERS as usize }, NO_PREALLOC> = HashMap::new();

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
    let Some(account) = account(key.workload()) else { return Lesson::NoRoom };
    let is_common = match admit(account, key.workload()) {
        Ok(is_common) => is_common,
        Err(lesson) => {
            atomic::add(refused(account), 1);
            return lesson;
        }
    };
    match NAMES.insert(key, Claims::only(claim), BPF_NOEXIST.into()) {
        Ok(()) => {}
        Err(error) if error == -EEXIST => {
            return match NAMES.get_ptr_mut(key) {
                Some(claims) => add(claims, claim, now),
                None => Lesson::NoRoom,
            };
        }
        Err(_) => {
            atomic::add(refused(account), 1);
            return Lesson::NoRoom;
        }
    }
    // In this order: the agent reads what is common first, and so may count something twice, and never too little.
    atomic::add(learnt(account), 1);
    if is_common && let Some(common) = self::account(COMMON) {
        atomic::add(learnt(common), 1);
    }
    Lesson::Learnt
}

/// The account of a workload, opened if need be; `None` if there is no room for it.
#[inline(always)]
fn account(workload: u64) -> Option<*mut Account> {
    if let Some(account) = QUOTAS.get_ptr_mut(workload) {
        return Some(account);
    }
    // Another processor may have opened it.
    let _ = QUOTAS.insert(workload, Account { learnt: 0, refused: 0 }, BPF_NOEXIST.into());
    QUOTAS.get_ptr_mut(workload)
}

/// Whether a workload may learn one more address, and whether that is one of the common part. Processors that ask at the same time
/// may each add one too many.
#[inline(always)]
fn admit(account: *mut Account, workload: u64) -> Result<bool, Lesson> {
    let has = count_of(account, workload);
    if has >= meta::quota().into() {
        return Err(Lesson::Quota);
    }
    if has < meta::guaranteed().into() {
        return Ok(false);
    }
    let common = match QUOTAS.get_ptr_mut(COMMON) {
        Some(common) => count_of(common, COMMON),
        None => 0,
    };
    if common < COMMON_FACTS.into() { Ok(true) } else { Err(Lesson::NoRoom) }
}

#[inline(always)]
fn count_of(account: *mut Account, workload: u64) -> u64 {
    // SAFETY: an element is replaced as a whole, and this is one word.
    let forgotten = unsafe { FORGOTTEN.get(workload) }.copied().unwrap_or(0);
    // SAFETY: a pointer into the map, whose elements outlive the program.
    let learnt = unsafe { ptr::read_volatile(learnt(account)) };
    Account { learnt, refused: 0 }.count(forgotten)
}

#[inline(always)]
const fn learnt(account: *mut Account) -> *mut u64 {
    // SAFETY: a pointer into the map, to an account; nothing is read.
    unsafe { &raw mut (*account).learnt }
}

#[inline(always)]
const fn refused(account: *mut Account) -> *mut u64 {
    // SAFETY: as in `learnt`.
    unsafe { &raw mut (*account).refused }
}

/// Adds a claim to those that others may be reading: one word at a time.
#[inline(always)]
fn add(claims: *mut Claims, claim: Claim, now: u32) -> Lesson {
    let place = read(claims).place(claim, now);
    if place.fit == Fit::None {
        return Lesson::Crowded;
    }
    // SAFETY: a pointer into the map, to one of as many words; its elements outlive the program.
    unsafe {
        let word = claims.cast::<u64>().add(place.index & (MOST_CLAIMS - 1));
        ptr::write_volatile(word, claim.over(place.old).word());
    }
    if place.fit == Fit::Free { Lesson::Learnt } else { Lesson::Crowded }
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
    let (high, low) = halves(flow.address);
    let asked = u64::from(view.index()) << 32 | u64::from(flow.protocol.number()) << 16 | u64::from(flow.port);
    let by = |workload| RuleId::from_field(allowed_by_name(asked, high, low, workload));
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
    let address = joined(high, low);
    let protocol = Protocol::from_kernel(asked as u32 >> 16);
    let flow = Flow { place: Place::Unknown, protocol, address, port: asked as u16 };
    match rule_by_name(&Maps::WITHOUT_SOCKET, View::new((asked >> 32) as u32), &flow, workload) {
        Some(rule) => rule.0.get(),
        None => 0,
    }
}
