//! What the kernel learnt of names: swept, and handed on from one agent to the next.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    os::fd::AsFd as _,
    path::Path,
};

use aya::maps::{HashMap as KernelHash, LpmTrie, Map, MapData, MapError};
use egress_common::{Address, Claim, Claims, ELSEWHERE, FactKey, KEY_BYTES, MOST_CLAIMS, NameId, NameKey, map};
use zerocopy::transmute;

use super::{DataplaneError, failed, names::NameIds, open, pinned, sys};
use crate::events::{boot_clock, spelled};

/// The `NAMES` map, in bytes: [`FactKey`] → [`Claims`].
type Names = KernelHash<MapData, [u8; size_of::<FactKey>()], [u8; size_of::<Claims>()]>;
/// The `QUOTAS` map: workload → how many facts it has.
type Quotas = KernelHash<MapData, u64, u32>;

/// Both maps of a set.
pub(super) struct Facts {
    names: Names,
    /// The same map, for a call that aya does not make.
    raw: MapData,
    quotas: Quotas,
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
        Ok(Self { names, raw: open(set, map::NAMES)?, quotas })
    }

    /// Removes what holds no longer, and what workloads learnt that are gone; counts what each has. The names of which
    /// something is known.
    pub(super) fn sweep(&mut self, is_there: impl Fn(u64) -> bool) -> Result<BTreeSet<NameId>, DataplaneError> {
        let (now, mut counts, mut learnt) = (now(), HashMap::<u64, u32>::new(), BTreeSet::new());
        let (mut over, mut facts) = (Vec::new(), Vec::new());
        for fact in &self.names {
            // What is removed meanwhile breaks off the walk; the next one is not far.
            let Ok((key, claims)) = fact else { break };
            facts.push((transmute!(key), transmute!(claims)));
        }
        for (key, claims) in facts {
            let (key, claims): (FactKey, Claims) = (key, claims);
            if claims.are_over(now) || !(is_there(key.workload()) || key.workload() == ELSEWHERE) {
                over.push(key);
                continue;
            }
            *counts.entry(key.workload()).or_default() += 1;
            learnt.extend((0..MOST_CLAIMS).filter_map(|index| claims.get(index).name()));
        }
        for key in over {
            self.remove(&key, now)?;
        }
        self.count(&counts)?;
        Ok(learnt)
    }

    /// Removes a fact. If it was heard of again meanwhile, it is put back: a moment in which it is not there, where both happen
    /// at the same time.
    fn remove(&mut self, key: &FactKey, now: u32) -> Result<(), DataplaneError> {
        let taken = sys::take::<FactKey, Claims>(self.raw.fd().as_fd(), key);
        match taken {
            Ok(claims) if claims.are_over(now) => Ok(()),
            Ok(claims) => self.put(key, claims),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            // Kernels before 5.14 cannot do both at once.
            Err(_) => {
                let key: [u8; size_of::<FactKey>()] = transmute!(*key);
                match self.names.remove(&key) {
                    Err(MapError::KeyNotFound) => Ok(()),
                    removed => removed.map_err(|cause| failed(map::NAMES, "empty", cause)),
                }
            }
        }
    }

    fn put(&mut self, key: &FactKey, claims: Claims) -> Result<(), DataplaneError> {
        let key: [u8; size_of::<FactKey>()] = transmute!(*key);
        let there: Claims = self.names.get(&key, 0).map_or(Claims::default(), |there| transmute!(there));
        let now = now();
        let united = claims.live_claims(now).fold(there, |united, claim| united.with(claim, now));
        if united == there {
            return Ok(());
        }
        let united: [u8; size_of::<Claims>()] = transmute!(united);
        self.names.insert(key, united, 0).map_err(|cause| failed(map::NAMES, "fill", cause))
    }

    /// The kernel counts roughly; this is exact, but for what is learnt at the same time.
    fn count(&mut self, counts: &HashMap<u64, u32>) -> Result<(), DataplaneError> {
        let there: Vec<(u64, u32)> = self.quotas.iter().flatten().collect();
        let failed = |cause| failed(map::QUOTAS, "fill", cause);
        for (workload, counted) in there {
            match counts.get(&workload) {
                None => match self.quotas.remove(&workload) {
                    Err(MapError::KeyNotFound) => {}
                    removed => removed.map_err(failed)?,
                },
                Some(&count) if count != counted => self.quotas.insert(workload, count, 0).map_err(failed)?,
                Some(_) => {}
            }
        }
        for (&workload, &count) in counts {
            if self.quotas.get(&workload, 0).is_err() {
                self.quotas.insert(workload, count, 0).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Takes over what another set learnt of names that these numbers know, too; how many facts that were.
    pub(super) fn adopt(&mut self, set: &Path, names: &NameIds) -> Result<usize, DataplaneError> {
        // What is of another version would be misread.
        pinned::meta(set)?;
        let theirs = patterns(set)?;
        let known: HashMap<u32, NameId> =
            theirs.into_iter().filter_map(|(id, pattern)| Some((id, names.closest(&pattern)?))).collect();
        let (mut adopted, other) = (0, Self::open(set)?);
        for (key, claims) in other.names.iter().flatten() {
            let (key, claims): (FactKey, Claims) = (transmute!(key), transmute!(claims));
            let now = now();
            let translated = claims.live_claims(now).filter_map(|claim| {
                let name = known.get(&claim.name()?.number())?;
                Some(Claim::new(*name, claim.expires()))
            });
            let claims = translated.fold(Claims::default(), |claims, claim| claims.with(claim, now));
            if !claims.are_over(now) {
                self.put(&key, claims)?;
                adopted += 1;
            }
        }
        Ok(adopted)
    }
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
