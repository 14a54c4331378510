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
        fs::read_to_string(path).map(|text| Self::parse(&text)).unwrap_or_default()
    }

    fn parse(text: &str) -> Self {
        let user = |line: &str| {
            let mut fields = line.split(':');
            Some((fields.next()?.to_owned(), fields.nth(1)?.parse().ok()?))
        };
        Self(text.lines().filter_map(user).collect())
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
        let users = Users::parse("root:x:0:0:root:/root:/bin/sh\nbroken\nwww-data:x:33:33::/var/www:/sbin/nologin\n");
        let www = UserIdentity { uid: Some(33), name: Some("www-data".to_owned()) };
        assert_eq!(users.identity("www-data"), www);
        assert_eq!(users.identity("33"), www);
        assert_eq!(users.identity("99"), UserIdentity { uid: Some(99), name: None });
        assert_eq!(users.identity("nobody"), UserIdentity { uid: None, name: Some("nobody".to_owned()) });
    }
}
