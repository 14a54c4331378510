//! The users of this system: `passwd(5)`.

use std::{fs, path::Path};

use crate::workload::UserIdentity;

/// Where users are listed.
pub const PASSWD: &str = "/etc/passwd";

/// Names and numbers of users.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Users(Vec<(String, u32)>);

impl Users {
    /// The users a file lists; none if it cannot be read.
    pub fn read(path: &Path) -> Self {
        fs::read(path).map(|text| Self::parse(&text)).unwrap_or_default()
    }

    /// A line that is not text names nobody whom a policy can name, and hides nobody else.
    fn parse(text: &[u8]) -> Self {
        let user = |line: &[u8]| {
            let mut fields = line.split(|&byte| byte == b':').map(std::str::from_utf8);
            Some((fields.next()?.ok()?.to_owned(), fields.nth(1)?.ok()?.parse().ok()?))
        };
        Self(text.split(|&byte| byte == b'\n').filter_map(user).collect())
    }

    /// A user by name or number, with the other where it is known.
    pub fn identity(&self, user: &str) -> UserIdentity {
        let listed = match user.parse::<u32>() {
            Ok(uid) => self.0.iter().find(|(_, listed)| *listed == uid),
            Err(_) => self.0.iter().find(|(name, _)| name == user),
        };
        match (listed, user.parse()) {
            (Some((name, uid)), _) => UserIdentity { uid: Some(*uid), name: Some(name.clone()) },
            (None, Ok(uid)) => UserIdentity { uid: Some(uid), name: None },
            (None, Err(_)) => UserIdentity { uid: None, name: Some(user.to_owned()) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_known_by_name_and_by_number() {
        let users = Users::parse(
            b"root:x:0:0:root:/root:/bin/sh\nbroken\n\xff:x:7:7::/:/\nwww-data:x:33:33:\xff:/var/www:/sbin/nologin\n",
        );
        let www = UserIdentity { uid: Some(33), name: Some("www-data".to_owned()) };
        assert_eq!(users.identity("www-data"), www);
        assert_eq!(users.identity("33"), www);
        assert_eq!(users.identity("99"), UserIdentity { uid: Some(99), name: None });
        assert_eq!(users.identity("nobody"), UserIdentity { uid: None, name: Some("nobody".to_owned()) });
    }
}
