//! `hosts(5)`: names the administrator of this host gave addresses to. Nobody is asked about these.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, Metadata},
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

/// The file as it was read last.
#[derive(Debug)]
pub(super) struct Hosts {
    path: PathBuf,
    /// `None` if it was not there or could not be read.
    stamp: Option<Stamp>,
    is_readable: bool,
    names: HashMap<String, BTreeSet<IpAddr>>,
}

/// What tells one version of the file from the next.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

impl Hosts {
    /// Reads the file.
    pub(super) fn read(path: PathBuf) -> Self {
        let mut hosts = Self { path, stamp: None, is_readable: true, names: HashMap::new() };
        hosts.refresh();
        hosts
    }

    /// The addresses of a name in lower case.
    pub(super) fn get(&self, name: &str) -> Option<&BTreeSet<IpAddr>> {
        self.names.get(name)
    }

    /// Reads the file again if it is another one; whether it says something else. What cannot be read leaves what was.
    pub(super) fn refresh(&mut self) -> bool {
        let read = match self.read_if_other() {
            Ok(read) => read,
            Err(error) => {
                if std::mem::replace(&mut self.is_readable, false) {
                    tracing::warn!(path = %self.path.display(), %error, "cannot read the hosts file");
                }
                return false;
            }
        };
        self.is_readable = true;
        read.is_some_and(|names| std::mem::replace(&mut self.names, names) != self.names)
    }

    /// The stamp is taken before the file is read, so that a change in between shows the next time.
    fn read_if_other(&mut self) -> io::Result<Option<HashMap<String, BTreeSet<IpAddr>>>> {
        let metadata = match fs::metadata(&self.path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => return Err(io::Error::other("not a regular file")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.stamp = None;
                return Ok(Some(HashMap::new()));
            }
            Err(error) => return Err(error),
        };
        let stamp = Some(stamp(&metadata));
        if self.stamp == stamp {
            return Ok(None);
        }
        let bytes = fs::read(&self.path)?;
        self.stamp = stamp;
        Ok(Some(parse(&String::from_utf8_lossy(&bytes))))
    }
}

fn stamp(metadata: &Metadata) -> Stamp {
    let (modified, changed) = ((metadata.mtime(), metadata.mtime_nsec()), (metadata.ctime(), metadata.ctime_nsec()));
    (metadata.dev(), metadata.ino(), metadata.len(), modified, changed)
}

/// Lines of an address and its names. Whatever follows `#`, and a line whose address is none, says nothing.
fn parse(text: &str) -> HashMap<String, BTreeSet<IpAddr>> {
    let mut names: HashMap<String, BTreeSet<IpAddr>> = HashMap::new();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>) else { continue };
        for name in words {
            let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
            names.entry(name).or_default().insert(address.to_canonical());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(hosts: &Hosts, name: &str) -> Vec<String> {
        hosts.get(name).into_iter().flatten().map(ToString::to_string).collect()
    }

    #[test]
    fn every_name_of_a_line_has_its_address() {
        let text = "127.0.0.1 localhost\n\t10.0.0.1\tDb.Example.com. db # old\n10.0.0.2 db\n::1 localhost\n\
                    # 10.0.0.3 db\nfe80::1%eth0 db\nbad db\n10.0.0.4\n::ffff:10.0.0.5 mapped\n";
        let names = parse(text);
        let expected = [
            ("localhost", vec!["127.0.0.1", "::1"]),
            ("db.example.com", vec!["10.0.0.1"]),
            ("db", vec!["10.0.0.1", "10.0.0.2"]),
            ("mapped", vec!["10.0.0.5"]),
        ];
        assert_eq!(names.len(), expected.len());
        for (name, addresses) in expected {
            assert_eq!(names[name], addresses.iter().map(|text| text.parse().unwrap()).collect(), "{name}");
        }
    }

    #[test]
    fn the_file_is_read_again_when_it_is_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        let mut hosts = Hosts::read(path.clone());
        assert!(!hosts.refresh() && hosts.get("db").is_none());
        fs::write(&path, "10.0.0.1 db\n").unwrap();
        assert!(hosts.refresh() && !hosts.refresh());
        assert_eq!(of(&hosts, "db"), ["10.0.0.1"]);
        fs::write(directory.path().join("new"), "10.0.0.2 db\n").unwrap();
        fs::rename(directory.path().join("new"), &path).unwrap();
        assert!(hosts.refresh());
        assert_eq!(of(&hosts, "db"), ["10.0.0.2"]);
        fs::remove_file(&path).unwrap();
        assert!(hosts.refresh() && hosts.get("db").is_none());
    }

    #[test]
    fn a_file_that_only_got_another_comment_says_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        fs::write(&path, "10.0.0.1 db\n").unwrap();
        let mut hosts = Hosts::read(path.clone());
        fs::write(&path, "10.0.0.1 db # main\n").unwrap();
        assert!(!hosts.refresh());
    }

    #[test]
    fn what_cannot_be_read_leaves_what_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        fs::write(&path, "10.0.0.1 db\n").unwrap();
        let mut hosts = Hosts::read(path.clone());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(!hosts.refresh());
        assert_eq!(of(&hosts, "db"), ["10.0.0.1"]);
    }
}
