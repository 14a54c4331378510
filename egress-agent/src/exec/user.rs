//! Whom the command runs as: `--user`, else whoever called sudo, else root.
//!
//! Users and groups are asked for through the C library, which also knows those of a directory service.

use std::{
    ffi::{CStr, CString, OsStr, OsString},
    mem::MaybeUninit,
    os::unix::ffi::OsStringExt,
    ptr,
};

use super::{ExecError, Sudo};

/// A user to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RunAs {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// All groups, `gid` included.
    pub(super) groups: Vec<u32>,
    /// `None` if no list of users has the number.
    pub(super) name: Option<String>,
    home: Option<OsString>,
}

/// `None` is to stay who this process is.
pub(super) fn choose(asked: Option<&str>, sudo: &Sudo) -> Result<Option<RunAs>, ExecError> {
    let user = match asked {
        Some(asked) => named(asked)?,
        None => match caller(sudo)? {
            Some(user) => user,
            None => return Ok(None),
        },
    };
    if let Some(name) = &user.name {
        tracing::info!("running as {name} (uid {})", user.uid);
    } else {
        tracing::info!("running as uid {}", user.uid);
    }
    Ok(Some(user))
}

/// A number that no list has would come without a group to give it.
fn named(asked: &str) -> Result<RunAs, ExecError> {
    let by_number = || asked.parse().ok().and_then(Account::by_uid);
    let account = Account::by_name(asked).or_else(by_number).ok_or_else(|| ExecError::NoSuchUser(asked.to_owned()))?;
    Ok(account.run_as(account.gid))
}

/// Who called sudo; `None` if nobody did, or root.
fn caller(sudo: &Sudo) -> Result<Option<RunAs>, ExecError> {
    let number = |variable, value: &OsStr| {
        let parsed = value.to_str().and_then(|value| value.parse().ok());
        parsed.ok_or_else(|| ExecError::NotANumber { variable, value: value.to_owned() })
    };
    let Some(uid) = sudo.uid.as_deref().map(|uid| number("SUDO_UID", uid)).transpose()? else { return Ok(None) };
    if uid == 0 {
        return Ok(None);
    }
    let account = Account::by_uid(uid);
    let gid = sudo.gid.as_deref().map(|gid| number("SUDO_GID", gid)).transpose()?;
    let unknown = || ExecError::NoSuchUser(uid.to_string());
    let gid = gid.or(account.as_ref().map(|account| account.gid)).ok_or_else(unknown)?;
    let user = account
        .map_or_else(|| RunAs { uid, gid, groups: vec![gid], name: None, home: None }, |account| account.run_as(gid));
    Ok(Some(user))
}

impl RunAs {
    /// What a login would set.
    pub(super) fn environment(&self) -> impl Iterator<Item = (&'static str, OsString)> {
        let name = || self.name.clone().map(OsString::from);
        let variables = [("HOME", self.home.clone()), ("USER", name()), ("LOGNAME", name())];
        variables.into_iter().filter_map(|(variable, value)| Some((variable, value?)))
    }
}

/// An entry of `passwd(5)`.
struct Account {
    name: CString,
    uid: u32,
    gid: u32,
    home: OsString,
}

/// Most bytes that an entry may take.
const LONGEST: usize = 1 << 20;

impl Account {
    fn by_name(name: &str) -> Option<Self> {
        let name = CString::new(name).ok()?;
        // SAFETY: the name ends with a zero byte; the rest is as `find` gives it.
        Self::find(|entry, buffer, length, found| unsafe {
            libc::getpwnam_r(name.as_ptr(), entry, buffer, length, found)
        })
    }

    fn by_uid(uid: u32) -> Option<Self> {
        // SAFETY: the arguments are as `find` gives them.
        Self::find(|entry, buffer, length, found| unsafe { libc::getpwuid_r(uid, entry, buffer, length, found) })
    }

    /// Asks with a buffer that is large enough.
    fn find(
        ask: impl Fn(*mut libc::passwd, *mut libc::c_char, usize, *mut *mut libc::passwd) -> libc::c_int,
    ) -> Option<Self> {
        let mut buffer: Vec<libc::c_char> = vec![0; 1024];
        loop {
            let (mut entry, mut found) = (MaybeUninit::<libc::passwd>::uninit(), ptr::null_mut());
            match ask(entry.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &raw mut found) {
                libc::ERANGE if buffer.len() < LONGEST => buffer.resize(buffer.len() * 2, 0),
                0 if !found.is_null() => {
                    // SAFETY: the call succeeded and found an entry, so `entry` is written and its strings lie in
                    // `buffer`, which is still there.
                    return Some(unsafe { Self::copy(entry.assume_init_ref()) });
                }
                _ => return None,
            }
        }
    }

    /// # Safety
    ///
    /// The strings of the entry must be there.
    unsafe fn copy(entry: &libc::passwd) -> Self {
        // SAFETY: as the caller promises; both end with a zero byte.
        let (name, home) = unsafe { (CStr::from_ptr(entry.pw_name), CStr::from_ptr(entry.pw_dir)) };
        let home = OsString::from_vec(home.to_bytes().to_vec());
        Self { name: name.to_owned(), uid: entry.pw_uid, gid: entry.pw_gid, home }
    }

    fn run_as(&self, gid: u32) -> RunAs {
        let name = self.name.to_string_lossy().into_owned();
        let (groups, home) = (self.groups(gid), Some(self.home.clone()));
        RunAs { uid: self.uid, gid, groups, name: Some(name), home }
    }

    /// The groups that list the user, and this one.
    fn groups(&self, gid: u32) -> Vec<u32> {
        let mut groups = vec![0; 64];
        loop {
            let mut count = libc::c_int::try_from(groups.len()).unwrap_or(libc::c_int::MAX);
            // SAFETY: the name ends with a zero byte, and there is room for as many groups as `count` says.
            let listed = unsafe { libc::getgrouplist(self.name.as_ptr(), gid, groups.as_mut_ptr(), &raw mut count) };
            let wanted = usize::try_from(count).unwrap_or(0);
            if listed >= 0 || wanted <= groups.len() {
                groups.truncate(wanted);
                return groups;
            }
            groups.resize(wanted, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sudo(uid: &str, gid: &str) -> Sudo {
        Sudo { uid: Some(uid.into()), gid: Some(gid.into()) }
    }

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let root = named("root").unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert_eq!(named("0").unwrap(), root);
        assert!(root.environment().any(|(name, value)| name == "USER" && value == "root"));
        assert!(matches!(named("no-such-user"), Err(ExecError::NoSuchUser(_))));
        assert!(matches!(named("4000000000"), Err(ExecError::NoSuchUser(_))));
    }

    #[test]
    fn whoever_called_sudo_is_the_user_unless_another_is_asked_for() {
        assert_eq!(choose(None, &Sudo::default()).unwrap(), None);
        assert_eq!(choose(None, &sudo("0", "0")).unwrap(), None);
        let unlisted = choose(None, &sudo("4000000000", "7")).unwrap().unwrap();
        assert_eq!((unlisted.uid, unlisted.gid, unlisted.groups, unlisted.name), (4_000_000_000, 7, vec![7], None));
        assert_eq!(choose(Some("root"), &sudo("4000000000", "7")).unwrap().unwrap().uid, 0);
        assert!(matches!(choose(None, &sudo("x", "7")), Err(ExecError::NotANumber { variable: "SUDO_UID", .. })));
        assert!(matches!(choose(None, &sudo("7", "")), Err(ExecError::NotANumber { variable: "SUDO_GID", .. })));
    }
}
