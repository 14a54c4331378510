//! What the kernel learnt of names: swept, and handed on from one agent to the next.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    os::fd::AsFd as _,
    path::Path,
};

use aya::maps::{HashMap as KernelHash, LpmTrie, Map, MapData, MapError};
use egress_common::{
    Account, Address, COMMON, COMMON_FACTS, Claim, Claims, FactKey, KEY_BYTES, MAX_FACTS, MOST_CLAIMS, NameId, NameKey,
    map,
};
use zerocopy::transmute;

use super::{DataplaneError, failed, names::NameIds, open, pinned, sys};
use crate::events::{boot_clock, spelled};

/// The `NAMES` map, in bytes: [`FactKey`] → [`Claims`].
type Names = KernelHash<MapData, [u8; size_of::<FactKey>()], [u8; size_of::<Claims>()]>;
/// The `QUOTAS` map, in bytes: workload → [`Account`].
type Quotas = KernelHash<MapData, u64, [u8; size_of::<Account>()]>;
/// The `FORGOTTEN` map.
type Forgotten = KernelHash<MapData, u64, u64>;

/// `BPF_NOEXIST` of `linux/bpf.h`.
const NO_EXIST: u64 = 1;

/// The maps of a set that hold what was learnt, and count it.
pub(super) struct Facts {
    names: Names,
    quotas: Quotas,
    /// Both of these, for calls that aya does not make.
    raw: MapData,
    raw_quotas: MapData,
    forgotten: Forgotten,
    /// How many answers were not learnt of each workload, when that was looked at last.
    refused: HashMap<u64, u64>,
}

/// What a workload has learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// Its id.
    pub(super) workload: u64,
    /// How many addresses it has.
    pub(super) has: u64,
    /// Whether answers to it were not learnt since the last look, as there was no room for it.
    pub(super) was_refused: bool,
}

/// What each workload asked for when it got an address: the `HOSTS` map.
#[derive(Debug)]
pub struct AskedNames(KernelHash<MapData, [u8; size_of::<FactKey>()], [u8; size_of::<NameKey>()]>);

impl AskedNames {
    /// Of the set at a path.
    pub(super) fn open(set: &Path) -> Result<Self, DataplaneError> {
        let map = Map::LruHashMap(open(set, map::HOSTS)?);
        Ok(Self(map.try_into().map_err(|cause| failed(map::HOSTS, "open", cause))?))
    }

    /// The name that a workload asked for last when it got an address, if that is still known.
    pub fn get(&self, workload: u64, address: Address) -> Option<String> {
        let key: [u8; size_of::<FactKey>()] = transmute!(FactKey::new(workload, address));
        let name: NameKey = transmute!(self.0.get(&key, 0).ok()?);
        spelled(&name)
    }
}

/// Seconds since boot, suspended time included.
fn now() -> u32 {
    u32::try_from(boot_clock().as_secs()).unwrap_or(u32::MAX)
}

impl Facts {
    /// Of the set at a path.
    pub(super) fn open(set: &Path) -> Result<Self, DataplaneError> {
        let hash = |name| open(set, name).map(Map::HashMap);
        let names = hash(map::NAMES)?.try_into().map_err(|cause| failed(map::NAMES, "open", cause))?;
        let quotas = hash(map::QUOTAS)?.try_into().map_err(|cause| failed(map::QUOTAS, "open", cause))?;
        let forgotten = hash(map::FORGOTTEN)?.try_into().map_err(|cause| failed(map::FORGOTTEN, "open", cause))?;
        let (raw, raw_quotas) = (open(set, map::NAMES)?, open(set, map::QUOTAS)?);
        Ok(Self { names, quotas, raw, raw_quotas, forgotten, refused: HashMap::new() })
    }

    /// What each workload has, and what it was refused since the last look.
    pub(super) fn look(&mut self) -> Result<Vec<Standing>, DataplaneError> {
        let accounts = self.accounts()?;
        self.refused.retain(|workload, _| accounts.contains_key(workload));
        let standing = |(&workload, account): (&u64, &Account)| {
            let before = self.refused.insert(workload, account.refused).unwrap_or(0);
            Standing { workload, has: self.has(workload, *account), was_refused: account.refused != before }
        };
        Ok(accounts.iter().map(standing).collect())
    }

    /// Removes what holds no longer, what workloads learnt that are gone, and what stands in the way of the guaranteed part of
    /// others. The names of which something is known.
    pub(super) fn sweep(
        &mut self,
        is_there: impl Fn(u64) -> bool,
        guaranteed: u32,
    ) -> Result<BTreeSet<NameId>, DataplaneError> {
        let (now, before) = (now(), self.accounts()?);
        let mut kept: HashMap<u64, Vec<(u32, Address)>> = HashMap::new();
        let (mut over, mut gone, mut learnt) = (Vec::new(), Vec::new(), BTreeSet::new());
        self.each(|key, claims| {
            if !is_there(key.workload()) {
                gone.push(key);
            } else if claims.are_over(now) {
                over.push(key);
            } else {
                let ends = claims.live_claims(now).map(Claim::expires).max().unwrap_or(now);
                kept.entry(key.workload()).or_default().push((ends, key.address()));
                learnt.extend((0..MOST_CLAIMS).filter_map(|index| claims.get(index).name()));
            }
        })?;
        let mut removed: HashMap<u64, u64> = HashMap::new();
        for key in over {
            if self.remove(&key, now)? {
                *removed.entry(key.workload()).or_default() += 1;
            } else {
                kept.entry(key.workload()).or_default().push((now, key.address()));
            }
        }
        self.remove_all(&gone)?;
        for (workload, addresses) in beyond(&mut kept, guaranteed.into()) {
            tracing::warn!(
                workload,
                addresses = addresses.len(),
                "names forgotten early, for the guaranteed part of others"
            );
            let keys: Vec<FactKey> = addresses.into_iter().map(|address| FactKey::new(workload, address)).collect();
            *removed.entry(workload).or_default() += self.remove_all(&keys)?;
        }
        self.settle(&before, &kept, &removed, is_there)?;
        self.share(guaranteed)?;
        Ok(learnt)
    }

    /// Every fact.
    fn each(&self, mut show: impl FnMut(FactKey, Claims)) -> Result<(), DataplaneError> {
        let read = |cause| DataplaneError::Element { name: map::NAMES, what: "read", cause };
        sys::each(self.raw.fd().as_fd(), |key: [u8; size_of::<FactKey>()], claims: [u8; size_of::<Claims>()]| {
            show(transmute!(key), transmute!(claims));
        })
        .map_err(read)
    }

    /// The account of each workload.
    fn accounts(&self) -> Result<HashMap<u64, Account>, DataplaneError> {
        accounts(&self.raw_quotas)
    }

    fn has(&self, workload: u64, account: Account) -> u64 {
        account.count(self.forgotten.get(&workload, 0).unwrap_or(0))
    }

    /// Tells the kernel how much of what it counted is gone. Where nothing was learnt meanwhile, that is known from what is there.
    fn settle(
        &mut self,
        before: &HashMap<u64, Account>,
        kept: &HashMap<u64, Vec<(u32, Address)>>,
        removed: &HashMap<u64, u64>,
        is_there: impl Fn(u64) -> bool,
    ) -> Result<(), DataplaneError> {
        let failed = |cause| failed(map::FORGOTTEN, "fill", cause);
        for (workload, account) in self.accounts()? {
            if workload == COMMON {
                continue;
            }
            if !is_there(workload) {
                self.close(workload)?;
                continue;
            }
            let forgotten = self.forgotten.get(&workload, 0).unwrap_or(0);
            let now = if before.get(&workload).is_some_and(|before| before.learnt == account.learnt) {
                account.learnt.wrapping_sub(kept.get(&workload).map_or(0, |kept| kept.len() as u64))
            } else {
                forgotten.wrapping_add(removed.get(&workload).copied().unwrap_or(0))
            };
            if now != forgotten {
                self.forgotten.insert(workload, now, 0).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Closes the account of a workload that is gone.
    fn close(&mut self, workload: u64) -> Result<(), DataplaneError> {
        let unless_gone = |name, removed| match removed {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(cause) => Err(failed(name, "empty", cause)),
        };
        unless_gone(map::QUOTAS, self.quotas.remove(&workload))?;
        unless_gone(map::FORGOTTEN, self.forgotten.remove(&workload))
    }

    /// Tells the kernel how much of the common part is in use, where so many are guaranteed to each workload. Whether that is no more
    /// than there is.
    pub(super) fn share(&mut self, guaranteed: u32) -> Result<bool, DataplaneError> {
        // First: what is learnt from here on is counted twice, until the next time, and nothing is forgotten.
        let common: Account = self.quotas.get(&COMMON, 0).map_or(Account::default(), |account| transmute!(account));
        let accounts = self.accounts()?;
        let beyond = accounts
            .iter()
            .filter(|(workload, _)| **workload != COMMON)
            .map(|(&workload, &account)| self.has(workload, account).saturating_sub(guaranteed.into()));
        let beyond: u64 = beyond.sum();
        let failed = |cause| failed(map::FORGOTTEN, "fill", cause);
        self.open_account(COMMON)?;
        self.forgotten.insert(COMMON, common.learnt.wrapping_sub(beyond), 0).map_err(failed)?;
        Ok(beyond <= COMMON_FACTS.into())
    }

    /// Opens the account of a workload, unless the kernel has.
    fn open_account(&mut self, workload: u64) -> Result<(), DataplaneError> {
        let account: [u8; size_of::<Account>()] = transmute!(Account::default());
        match self.quotas.insert(workload, account, NO_EXIST) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            opened => opened.map_err(|cause| failed(map::QUOTAS, "fill", cause)),
        }
    }

    /// Removes facts; how many were there.
    fn remove_all(&self, keys: &[FactKey]) -> Result<u64, DataplaneError> {
        let removed = sys::remove_batch(self.raw.fd().as_fd(), keys);
        let removed = removed.map_err(|cause| DataplaneError::Element { name: map::NAMES, what: "empty", cause })?;
        Ok(removed as u64)
    }

    /// Removes a fact that is over; whether it is gone. If it was heard of again meanwhile, it is put back: a moment in which it is not
    /// there, where both happen at the same time.
    fn remove(&mut self, key: &FactKey, now: u32) -> Result<bool, DataplaneError> {
        let taken = sys::take::<FactKey, Claims>(self.raw.fd().as_fd(), key);
        match taken {
            Ok(claims) if claims.are_over(now) => Ok(true),
            // Where the kernel has put it there anew, it has counted it anew.
            Ok(claims) => Ok(!self.put(key, claims)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // Kernels before 5.14 cannot do both at once.
            Err(_) => {
                let key: [u8; size_of::<FactKey>()] = transmute!(*key);
                match self.names.remove(&key) {
                    Ok(()) => Ok(true),
                    Err(MapError::KeyNotFound) => Ok(false),
                    Err(cause) => Err(failed(map::NAMES, "empty", cause)),
                }
            }
        }
    }

    /// Puts a fact there, or adds to what is there; whether there was none.
    fn put(&mut self, key: &FactKey, claims: Claims) -> Result<bool, DataplaneError> {
        let key: [u8; size_of::<FactKey>()] = transmute!(*key);
        let known = self.names.get(&key, 0).ok();
        let there: Claims = known.map_or(Claims::default(), |there| transmute!(there));
        let now = now();
        let united = claims.live_claims(now).fold(there, |united, claim| united.with(claim, now));
        if united == there {
            return Ok(false);
        }
        let united: [u8; size_of::<Claims>()] = transmute!(united);
        self.names.insert(key, united, 0).map_err(|cause| failed(map::NAMES, "fill", cause))?;
        Ok(known.is_none())
    }

    /// Takes over what another set learnt of names that these numbers know, too; how many facts that were.
    pub(super) fn adopt(&mut self, set: &Path, names: &NameIds) -> Result<usize, DataplaneError> {
        // What is of another version would be misread.
        pinned::meta(set)?;
        let theirs = patterns(set)?;
        let known: HashMap<u32, NameId> =
            theirs.into_iter().filter_map(|(id, pattern)| Some((id, names.closest(&pattern)?))).collect();
        let other = Self::open(set)?;
        let mut facts = Vec::new();
        other.each(|key, claims| facts.push((key, claims)))?;
        let (mut adopted, mut added) = (0, HashMap::<u64, u64>::new());
        for (key, claims) in facts {
            let now = now();
            let translated = claims.live_claims(now).filter_map(|claim| {
                let name = known.get(&claim.name()?.number())?;
                Some(Claim::new(*name, claim.expires()))
            });
            let claims = translated.fold(Claims::default(), |claims, claim| claims.with(claim, now));
            if !claims.are_over(now) {
                *added.entry(key.workload()).or_default() += u64::from(self.put(&key, claims)?);
                adopted += 1;
            }
        }
        for (workload, added) in added {
            self.credit(workload, added)?;
        }
        Ok(adopted)
    }

    /// Counts facts of a workload that the kernel did not learn.
    fn credit(&mut self, workload: u64, added: u64) -> Result<(), DataplaneError> {
        self.open_account(workload)?;
        let forgotten = self.forgotten.get(&workload, 0).unwrap_or(0).wrapping_sub(added);
        self.forgotten.insert(workload, forgotten, 0).map_err(|cause| failed(map::FORGOTTEN, "fill", cause))
    }
}

/// The accounts of a set, in its `QUOTAS` map.
pub(super) fn accounts(quotas: &MapData) -> Result<HashMap<u64, Account>, DataplaneError> {
    let mut accounts = HashMap::new();
    sys::each(quotas.fd().as_fd(), |workload: u64, account: Account| accounts.extend([(workload, account)]))
        .map_err(|cause| DataplaneError::Element { name: map::QUOTAS, what: "read", cause })?;
    Ok(accounts)
}

/// Where more is in use beyond the guaranteed parts than there is, what is to go: of the workloads that have most, what ends first. Takes
/// it out of what is kept.
fn beyond(kept: &mut HashMap<u64, Vec<(u32, Address)>>, guaranteed: u64) -> Vec<(u64, Vec<Address>)> {
    /// So that not each workload that comes takes a sweep.
    const MOST_LEFT: u64 = COMMON_FACTS as u64 / 8 * 7;
    let used = |most: u64| -> u64 {
        kept.values().map(|facts| (facts.len() as u64).min(most).saturating_sub(guaranteed)).sum()
    };
    if used(u64::MAX) <= COMMON_FACTS.into() {
        return Vec::new();
    }
    let (mut enough, mut too_much) = (guaranteed, u64::from(MAX_FACTS));
    while too_much - enough > 1 {
        let middle = enough.midpoint(too_much);
        if used(middle) <= MOST_LEFT { enough = middle } else { too_much = middle }
    }
    let most = usize::try_from(enough).unwrap_or(usize::MAX);
    let with_more = kept.iter_mut().filter(|(_, facts)| facts.len() > most);
    let cut = with_more.map(|(&workload, facts)| {
        facts.sort_unstable_by_key(|&(ends, _)| std::cmp::Reverse(ends));
        (workload, facts.split_off(most).into_iter().map(|(_, address)| address).collect())
    });
    cut.collect()
}

/// The names that a set knows, by their numbers.
fn patterns(set: &Path) -> Result<HashMap<u32, Vec<u8>>, DataplaneError> {
    let read = |cause| failed(map::NAME_TRIE, "read", cause);
    if !set.join(map::NAME_TRIE).exists() {
        return Ok(HashMap::new());
    }
    let trie = LpmTrie::<_, [u8; KEY_BYTES], u32>::try_from(Map::LpmTrie(open(set, map::NAME_TRIE)?)).map_err(read)?;
    let pattern = |(key, id): (aya::maps::lpm_trie::Key<[u8; KEY_BYTES]>, u32)| {
        let length = usize::try_from(key.prefix_len() / 8).unwrap_or(0).min(KEY_BYTES);
        (id, key.data()[..length].to_vec())
    };
    trie.iter().map(|element| element.map(pattern).map_err(read)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses(count: usize) -> Vec<(u32, Address)> {
        (0..count).map(|index| (u32::try_from(index % 100).unwrap(), Address::from_bits(index as u128))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What is cut is as much as it takes, from those that have most, and never of a guaranteed part.
        #[test]
        fn room_is_made_by_those_that_have_most(counts in prop::collection::vec(0..20_000_usize, 1..60), guaranteed in 0..9_000_u64) {
            let before: HashMap<u64, Vec<(u32, Address)>> =
                counts.iter().enumerate().map(|(workload, &count)| (workload as u64, addresses(count))).collect();
            let mut kept = before.clone();
            let cut: HashMap<u64, Vec<Address>> = beyond(&mut kept, guaranteed).into_iter().collect();
            let used = |kept: &HashMap<u64, Vec<(u32, Address)>>| -> u64 {
                kept.values().map(|facts| (facts.len() as u64).saturating_sub(guaranteed)).sum()
            };
            prop_assert!(used(&kept) <= u64::from(COMMON_FACTS));
            prop_assert_eq!(cut.is_empty(), used(&before) <= u64::from(COMMON_FACTS));
            let most_left = kept.values().map(Vec::len).max().unwrap();
            for (workload, addresses) in &cut {
                prop_assert_eq!(kept[workload].len(), most_left);
                prop_assert!(most_left as u64 >= guaranteed);
                prop_assert_eq!(kept[workload].len() + addresses.len(), before[workload].len());
                let last_cut = addresses.iter().map(|address| address.to_bits() % 100).max().unwrap();
                let first_kept = kept[workload].iter().map(|(ends, _)| u128::from(*ends)).min().unwrap_or(u128::MAX);
                prop_assert!(last_cut <= first_kept);
            }
        }
    }
}
