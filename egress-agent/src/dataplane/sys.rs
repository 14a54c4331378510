//! Calls of `bpf(2)` that aya does not make. Layouts: `union bpf_attr` of `include/uapi/linux/bpf.h`.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use zerocopy::{FromBytes, IntoBytes};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_MAP_GET_FD_BY_ID: libc::c_int = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_MAP_DELETE_BATCH: libc::c_int = 27;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;

/// The attributes of `BPF_MAP_CREATE`, as far as they are used.
#[repr(C)]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// The attributes of `BPF_MAP_LOOKUP_BATCH`, `BPF_MAP_UPDATE_BATCH` and `BPF_MAP_DELETE_BATCH`.
#[repr(C)]
struct Batch {
    /// Cursors, which only look-ups use: where to begin, 0 for the beginning, and where that ended.
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    /// In: how many there are. Out: how many were taken.
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// The attributes of a call on one element of a map.
#[repr(C)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The attributes of `BPF_LINK_DETACH`.
#[repr(C)]
struct Detach {
    link_fd: u32,
}

/// The attributes of `BPF_LINK_CREATE`.
#[repr(C)]
struct Attach {
    program_fd: u32,
    target_fd: u32,
    kind: u32,
    flags: u32,
}

/// The attributes of `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[repr(C)]
struct Open {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The attributes of `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info`, as it is for links to cgroups.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program_id: u32,
    padding: u32,
    cgroup_id: u64,
    attach_type: u32,
    reserved: u32,
}

/// The attributes of `BPF_PROG_GET_FD_BY_ID` and `BPF_MAP_GET_FD_BY_ID`.
#[repr(C)]
struct ById {
    id: u32,
    next: u32,
    flags: u32,
}

/// The attributes of `BPF_PROG_QUERY`.
#[repr(C)]
struct Query {
    target_fd: u32,
    kind: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    /// In: how many there is room for. Out: how many there are.
    count: u32,
    padding: u32,
}

/// The length of names in the kernel, with the zero at the end.
const NAME: usize = 16;
/// Most programs that a cgroup can have of one type (`BPF_CGROUP_MAX_PROGS`).
const MAX_PROGRAMS: usize = 64;
/// Most maps that a program of ours uses; of one that uses more, the first count.
const MAX_MAPS: usize = 64;
/// Most bytes of an element that is read whole.
const MAX_VALUE: usize = 512;

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    lengths: [u32; 2],
    instructions: [u64; 2],
    load_time: u64,
    uid: u32,
    map_count: u32,
    map_ids: u64,
    name: [u8; NAME],
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; NAME],
}

/// The ids of the programs that are attached to a cgroup itself. `kind` is of `enum bpf_attach_type`. Takes `CAP_NET_ADMIN`.
pub(super) fn programs(cgroup: BorrowedFd<'_>, kind: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_PROGRAMS];
    let (count, [flags, attach_flags, padding]) = (u32::try_from(ids.len()).unwrap_or(0), [0; 3]);
    let pointer = ids.as_mut_ptr() as u64;
    let mut query = Query { target_fd: fd(cgroup), kind, flags, attach_flags, ids: pointer, count, padding };
    // SAFETY: the kernel reads and writes the attributes, and writes at most `count` ids, for which there is room.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(query.count as usize).collect())
}

/// The name of a program, and the ids of its maps. Takes `CAP_SYS_ADMIN`.
pub(super) fn program(id: u32) -> io::Result<(String, Vec<u32>)> {
    let program = by_id(BPF_PROG_GET_FD_BY_ID, id)?;
    let mut ids = [0_u32; MAX_MAPS];
    let map_count = u32::try_from(ids.len()).unwrap_or(0);
    let mut info = ProgramInfo { map_count, map_ids: ids.as_mut_ptr() as u64, ..ProgramInfo::default() };
    let length = u32::try_from(size_of::<ProgramInfo>()).expect("it is 80 bytes long");
    call(BPF_OBJ_GET_INFO_BY_FD, &GetInfo { fd: fd(program.as_fd()), length, info: (&raw mut info) as u64 })?;
    Ok((name(&info.name), ids.into_iter().take(info.map_count as usize).collect()))
}

/// The name of a map, and the first element if it is an array of elements that are not large. Takes `CAP_SYS_ADMIN`.
pub(super) fn first_element(id: u32) -> io::Result<(String, Vec<u8>)> {
    const ARRAY: u32 = 2;
    let map = by_id(BPF_MAP_GET_FD_BY_ID, id)?;
    let mut info = MapInfo::default();
    let length = u32::try_from(size_of::<MapInfo>()).expect("it is 40 bytes long");
    call(BPF_OBJ_GET_INFO_BY_FD, &GetInfo { fd: fd(map.as_fd()), length, info: (&raw mut info) as u64 })?;
    let size = info.value_size as usize;
    if info.kind != ARRAY || info.key_size != 4 || size > MAX_VALUE {
        return Ok((name(&info.name), Vec::new()));
    }
    let (mut element, key, padding, flags) = ([0_u8; MAX_VALUE], 0_u32, 0, 0);
    let (key, value) = ((&raw const key) as u64, element.as_mut_ptr() as u64);
    call(BPF_MAP_LOOKUP_ELEM, &Element { map_fd: fd(map.as_fd()), padding, key, value, flags })?;
    Ok((name(&info.name), element[..size].to_vec()))
}

fn by_id(command: libc::c_int, id: u32) -> io::Result<OwnedFd> {
    let found = call(command, &ById { id, next: 0, flags: 0 })?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(found) })
}

fn name(bytes: &[u8; NAME]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// Creates a trie (`BPF_MAP_TYPE_LPM_TRIE`) of elements of these sizes, without preallocation, as every trie is.
pub(super) fn create_trie<K, V>(max_entries: u32) -> io::Result<OwnedFd> {
    const LPM_TRIE: u32 = 11;
    const NO_PREALLOC: u32 = 1;
    let size = |size: usize| u32::try_from(size).expect("keys and values are small");
    let (key_size, value_size) = (size(size_of::<K>()), size(size_of::<V>()));
    let fd = call(BPF_MAP_CREATE, &Create { kind: LPM_TRIE, key_size, value_size, max_entries, flags: NO_PREALLOC })?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts elements into a map whose keys and values have these types; tells how many of them it took.
pub(super) fn update_batch<K: IntoBytes, V: IntoBytes>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> (usize, io::Result<()>) {
    let count = u32::try_from(keys.len().min(values.len())).unwrap_or(u32::MAX);
    let (keys, values) = (keys.as_ptr() as u64, values.as_ptr() as u64);
    let (from, to, element_flags, flags) = (0, 0, 0, 0);
    let mut batch = Batch { from, to, keys, values, count, map_fd: fd(map), element_flags, flags };
    // SAFETY: the kernel reads the batch and writes its count; it reads `count` keys and values of the map's sizes, which
    // `create_trie` took from the same types.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_BATCH, &raw mut batch, size_of::<Batch>()) };
    if result == 0 {
        return (count as usize, Ok(()));
    }
    let error = io::Error::last_os_error();
    // Where the kernel did not get as far as the elements, it leaves the count as it was.
    let taken = if batch.count == count { 0 } else { batch.count as usize };
    (taken, Err(error))
}

/// The first `count` values of an array whose values have this type, by one call.
pub(super) fn first_values<V: FromBytes + IntoBytes + Clone>(array: BorrowedFd<'_>, count: u32) -> io::Result<Vec<V>> {
    let (mut keys, mut values) = (vec![0_u32; count as usize], vec![V::new_zeroed(); count as usize]);
    let mut next = 0_u32;
    let (from, to, keys) = (0, (&raw mut next) as u64, keys.as_mut_ptr() as u64);
    let (values_at, map_fd, element_flags, flags) = (values.as_mut_ptr() as u64, fd(array), 0, 0);
    let mut batch = Batch { from, to, keys, values: values_at, count, map_fd, element_flags, flags };
    // SAFETY: the kernel reads the batch and writes its count; it writes at most `count` keys and values of the array's sizes,
    // for which there is room: keys of arrays have four bytes, and the caller names the type of the values.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut batch, size_of::<Batch>()) };
    let error = io::Error::last_os_error();
    // `ENOENT`: that was all of it.
    if result < 0 && error.kind() != io::ErrorKind::NotFound {
        return Err(error);
    }
    values.truncate(batch.count as usize);
    Ok(values)
}

/// The map that an element of an array of maps points to. Takes `CAP_SYS_ADMIN`.
pub(super) fn inner(outer: BorrowedFd<'_>, index: u32) -> io::Result<OwnedFd> {
    let (mut id, padding, flags) = (0_u32, 0, 0);
    let (key, value) = ((&raw const index) as u64, (&raw mut id) as u64);
    call(BPF_MAP_LOOKUP_ELEM, &Element { map_fd: fd(outer), padding, key, value, flags })?;
    by_id(BPF_MAP_GET_FD_BY_ID, id)
}

/// Shows every element of a hash map whose keys and values have these types. One that is there from beginning to end is shown once,
/// whatever comes and goes meanwhile, and that takes no longer for it: the kernel gives whole buckets, one after the other.
pub(super) fn each<K: FromBytes + Copy, V: FromBytes + Copy>(
    map: BorrowedFd<'_>,
    mut show: impl FnMut(K, V),
) -> io::Result<()> {
    let mut room = 4096;
    let (mut cursor, mut begun) = ([0_u32; 2], false);
    loop {
        let (mut keys, mut values) = (vec![K::new_zeroed(); room], vec![V::new_zeroed(); room]);
        let from = if begun { (&raw const cursor[0]) as u64 } else { 0 };
        let mut batch = Batch {
            from,
            to: (&raw mut cursor[1]) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(room).unwrap_or(u32::MAX),
            map_fd: fd(map),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads the batch and writes its count, and at most `count` keys and values of the map's sizes, which
        // the caller took from these types; it reads and writes one cursor of four bytes each.
        let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut batch, size_of::<Batch>()) };
        let error = if result == 0 { None } else { Some(io::Error::last_os_error()) };
        match error.as_ref().and_then(io::Error::raw_os_error) {
            // The bucket that is next has more.
            Some(libc::ENOSPC) => room *= 2,
            Some(libc::EINTR) => {}
            None | Some(libc::ENOENT) => {
                keys.iter().zip(&values).take(batch.count as usize).for_each(|(&key, &value)| show(key, value));
                if error.is_some() {
                    return Ok(());
                }
                (cursor[0], begun) = (cursor[1], true);
            }
            Some(_) => return error.map_or(Ok(()), Err),
        }
    }
}

/// Removes elements of a map whose keys have this type; tells how many were there.
pub(super) fn remove_batch<K: IntoBytes>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<usize> {
    let (mut rest, mut removed) = (keys, 0);
    while !rest.is_empty() {
        let count = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let (from, to, values, element_flags, flags) = (0, 0, 0, 0, 0);
        let mut batch =
            Batch { from, to, keys: rest.as_ptr() as u64, values, count, map_fd: fd(map), element_flags, flags };
        // SAFETY: the kernel reads the batch and writes its count; it reads `count` keys of the map's size, which the caller took
        // from this type.
        let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_DELETE_BATCH, &raw mut batch, size_of::<Batch>()) };
        if result == 0 {
            return Ok(removed + rest.len());
        }
        let error = io::Error::last_os_error();
        let done = batch.count as usize;
        match error.raw_os_error() {
            // One of them was gone: the kernel stops there.
            Some(libc::ENOENT) if done < rest.len() => {
                removed += done;
                rest = &rest[done + 1..];
            }
            Some(libc::EINTR) if done < rest.len() => {
                removed += done;
                rest = &rest[done..];
            }
            _ => return Err(error),
        }
    }
    Ok(removed)
}

/// Puts one element into a map whose keys and values have these types.
pub(super) fn update<K: IntoBytes, V: IntoBytes>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let (padding, flags) = (0, 0);
    let (key, value) = (&raw const *key as u64, &raw const *value as u64);
    call(BPF_MAP_UPDATE_ELEM, &Element { map_fd: fd(map), padding, key, value, flags }).map(drop)
}

/// Removes an element of a map whose keys and values have these types, and gives it.
pub(super) fn take<K: IntoBytes, V: FromBytes + IntoBytes>(map: BorrowedFd<'_>, key: &K) -> io::Result<V> {
    let mut taken = V::new_zeroed();
    let (padding, flags) = (0, 0);
    let (key, value) = (&raw const *key as u64, &raw mut taken as u64);
    call(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &Element { map_fd: fd(map), padding, key, value, flags })?;
    Ok(taken)
}

/// Attaches a program to a cgroup, beside those of others (`BPF_F_ALLOW_MULTI`, as for every link), until the link is closed
/// and no pin holds it. `kind` is of `enum bpf_attach_type`.
pub(super) fn attach(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, kind: u32) -> io::Result<OwnedFd> {
    let link = call(BPF_LINK_CREATE, &Attach { program_fd: fd(program), target_fd: fd(cgroup), kind, flags: 0 })?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Pins an object of bpf.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    call(BPF_OBJ_PIN, &Open { path: path.as_ptr() as u64, fd: fd(object), flags: 0 }).map(drop)
}

/// Opens a pin.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = call(BPF_OBJ_GET, &Open { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The id of the cgroup that a link is attached to; 0 if that is gone.
pub(super) fn link_cgroup(link: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(link_info(link)?.cgroup_id)
}

/// The id of the program of a link.
pub(super) fn link_program(link: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(link_info(link)?.program_id)
}

fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let length = u32::try_from(size_of::<LinkInfo>()).expect("it is 32 bytes long");
    call(BPF_OBJ_GET_INFO_BY_FD, &GetInfo { fd: fd(link), length, info: (&raw mut info) as u64 })?;
    Ok(info)
}

/// Empties an element of an array of maps. Returns after a grace period. It is no error if the element was empty.
pub(super) fn clear_inner(outer: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let (padding, value, flags) = (0, 0, 0);
    let attributes = Element { map_fd: fd(outer), padding, key: (&raw const index) as u64, value, flags };
    match call(BPF_MAP_DELETE_ELEM, &attributes) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map(drop),
    }
}

/// Takes a program off its cgroup, whoever else holds the link. It is no error if the cgroup is gone.
pub(super) fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    match call(BPF_LINK_DETACH, &Detach { link_fd: fd(link) }) {
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
        result => result.map(drop),
    }
}

fn fd(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("an open descriptor is not negative")
}

/// `A` is the beginning of `union bpf_attr` for the command; the kernel takes what is missing as zeros. The addresses in it
/// point to values that live during the call.
fn call<A>(command: libc::c_int, attributes: &A) -> io::Result<RawFd> {
    // SAFETY: the kernel reads `size_of::<A>()` bytes at the pointer, which is valid for that, and writes nothing there; the
    // addresses in it point to values that the callers hold, of the sizes that the command asks for.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(RawFd::try_from(result).unwrap_or(0)) }
}
