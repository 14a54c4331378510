//! Debian packages without installing them: private package lists, private downloads, `dpkg-deb --extract`.
//!
//! Needs neither root nor a write to the system: apt's own sources and keys are read, everything else lies below one
//! directory. Nothing here runs a package's scripts, so what is unpacked must work without them.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, IsTerminal as _},
    path::{Component, Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{process, workspace::Workspace};

/// Package lists older than this may name files that are gone.
const LISTS_AGE: Duration = Duration::from_hours(1);

const TOOLS: [&str; 3] = ["apt-get", "apt-cache", "dpkg-deb"];

pub fn is_available() -> bool {
    TOOLS.iter().all(|tool| process::find(tool).is_some())
}

/// A package file that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    package: String,
    file: String,
    bytes: u64,
}

/// Apt with all its state in one private directory.
pub struct Debian {
    directory: PathBuf,
}

impl Debian {
    /// Apt with package lists that are fresh enough.
    pub fn open(workspace: &Workspace) -> Result<Self> {
        ensure!(is_available(), "apt-get, apt-cache and dpkg-deb are needed, as on Debian and Ubuntu");
        let debian = Self { directory: workspace.target("apt") };
        debian.configure()?;
        debian.update()?;
        Ok(debian)
    }

    /// Apt that knows one suite of an archive and nothing that is installed.
    pub fn suite(directory: &Path, archive: &str, suite: &str) -> Result<Self> {
        Self::of_suite(directory, archive, suite, &["deb"])
    }

    /// The same, which knows source packages too.
    pub fn suite_with_sources(directory: &Path, archive: &str, suite: &str) -> Result<Self> {
        Self::of_suite(directory, archive, suite, &["deb", "deb-src"])
    }

    fn of_suite(directory: &Path, archive: &str, suite: &str, kinds: &[&str]) -> Result<Self> {
        const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let debian = Self { directory: directory.to_owned() };
        debian.configure()?;
        let write = |name: &str, text: &str| {
            let file = directory.join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        let line = |kind: &&str| format!("{kind} [signed-by={KEYRING}] {archive} {suite} main\n");
        write("sources.list", &kinds.iter().map(line).collect::<String>())?;
        write("status", "")?;
        let only = |what: &str, file: &str| format!("Dir::{what} \"{}/{file}\";\n", directory.display());
        let more = [only("Etc::SourceList", "sources.list"), only("State::status", "status")].concat();
        let configuration = configuration(directory) + &more + "Dir::Etc::SourceParts \"-\";\n";
        write("apt.conf", &configuration)?;
        debian.update()?;
        Ok(debian)
    }

    /// Where the system gets an archive from, such as `debian` or `debian-security`.
    pub fn mirror(archive: &str) -> Result<String> {
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", "$(REPO_URI)"]).env("LC_ALL", "C.UTF-8");
        let printed = process::capture(&mut command, "looking up the sources of packages")?;
        let found = printed.lines().find(|uri| uri.trim_end_matches('/').ends_with(&format!("/{archive}")));
        found.map(str::to_owned).with_context(|| format!("apt has no source for {archive}"))
    }

    /// These packages and no others.
    pub fn archives(&self, named: &[&str]) -> Result<Vec<Archive>> {
        let mut command = self.apt("apt-get");
        command.args(["-qq", "download", "--print-uris"]).args(named);
        let printed = process::capture(&mut command, &format!("looking up {}", named.join(", ")))?;
        let archives = parse_uris(&printed);
        ensure!(archives.len() == named.len(), "{} of {} packages can be had", archives.len(), named.len());
        Ok(archives)
    }

    /// The direct dependencies of `package`, without alternatives that are virtual.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let mut command = self.apt("apt-cache");
        let printed = process::capture(command.args(["depends", package]), &format!("looking up {package}"))?;
        Ok(parse_depends(&printed))
    }

    /// What to download for `named`, and for what `installable` needs beyond what the system has.
    pub fn plan(&self, named: &[&str], installable: &[&str]) -> Result<Vec<Archive>> {
        let missing = self.missing(installable)?;
        let packages: BTreeSet<&str> = named.iter().copied().chain(missing.iter().map(String::as_str)).collect();
        self.archives(&packages.into_iter().collect::<Vec<_>>())
    }

    /// Downloads `archives` (what an earlier try completed is kept) and unpacks them into `directory`.
    pub fn unpack(&self, archives: &[Archive], directory: &Path) -> Result<()> {
        let downloads = self.directory.join("archives");
        eprintln!("xtask: downloading {} into {}", describe(archives), downloads.display());
        let mut command = self.apt("apt-get");
        if !io::stderr().is_terminal() {
            command.arg("-qq");
        }
        command.arg("download").args(archives.iter().map(|archive| &archive.package)).current_dir(&downloads);
        process::run_to_stderr(&mut command, "downloading Debian packages")?;
        eprintln!("xtask: unpacking into {}", directory.display());
        for archive in archives {
            let file = downloads.join(&archive.file);
            let mut command = Command::new("dpkg-deb");
            command.arg("--extract").args([&file, directory]);
            process::run_to_stderr(&mut command, &format!("unpacking {}", archive.package))?;
            fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
        }
        Ok(())
    }

    /// Downloads what upstream released as `package`, without Debian's changes, and unpacks it as `directory`.
    pub fn unpack_source(&self, package: &str, directory: &Path) -> Result<()> {
        let downloads = self.directory.join("archives");
        eprintln!("xtask: downloading the sources of {package} into {}", downloads.display());
        let mut command = self.apt("apt-get");
        command.args(["-qq", "source", "--download-only", package]).current_dir(&downloads);
        process::run_to_stderr(&mut command, "downloading a source package")?;
        let original = file_in(&downloads, &format!("{package}_"), ".orig.tar.")?;
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--strip-components=1", "--directory"]).arg(directory).arg("--file").arg(original);
        process::run_to_stderr(&mut tar, &format!("unpacking the sources of {package}"))
    }

    fn missing(&self, installable: &[&str]) -> Result<Vec<String>> {
        let mut command = self.apt("apt-get");
        command.args(["-qq", "install", "--print-uris", "--yes", "--no-install-recommends"]).args(installable);
        let printed = process::capture(&mut command, &format!("resolving what {} needs", installable.join(", ")))?;
        Ok(parse_uris(&printed).into_iter().map(|archive| archive.package).collect())
    }

    fn configure(&self) -> Result<()> {
        for directory in ["lists/partial", "archives/partial"] {
            let directory = self.directory.join(directory);
            fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        }
        let file = self.configuration();
        fs::write(&file, configuration(&self.directory)).with_context(|| format!("cannot write {}", file.display()))
    }

    fn update(&self) -> Result<()> {
        let stamp = self.directory.join("lists.done");
        let age = fs::metadata(&stamp).and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
        if matches!(age, Ok(Ok(age)) if age < LISTS_AGE) {
            return Ok(());
        }
        eprintln!("xtask: reading Debian's package lists");
        process::run_to_stderr(self.apt("apt-get").args(["-qq", "update"]), "reading Debian's package lists")?;
        fs::write(&stamp, "").with_context(|| format!("cannot write {}", stamp.display()))
    }

    fn configuration(&self) -> PathBuf {
        self.directory.join("apt.conf")
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("--config-file").arg(self.configuration()).env("LC_ALL", "C.UTF-8");
        command
    }
}

/// The one file in a directory whose name begins and goes on so.
fn file_in(directory: &Path, begin: &str, middle: &str) -> Result<PathBuf> {
    let files = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let is_meant = |name: &str| name.starts_with(begin) && name.contains(middle);
    let found = files.flatten().find(|file| file.file_name().to_str().is_some_and(is_meant));
    Ok(found.with_context(|| format!("{} has no {begin}…{middle}…", directory.display()))?.path())
}

/// The directories below `root` in which unpacked libraries lie: at least one.
pub fn library_directories(root: &Path) -> Result<Vec<PathBuf>> {
    let found = libraries_below(root)?;
    ensure!(!found.is_empty(), "{} has no libraries: remove it and start again", root.display());
    Ok(found)
}

/// The same, and none where the system has all that is needed.
fn libraries_below(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for parent in ["usr/lib", "lib"] {
        let Ok(entries) = fs::read_dir(root.join(parent)) else { continue };
        for entry in entries {
            let path = entry.with_context(|| format!("cannot read {}", root.display()))?.path();
            // Multiarch directories: `x86_64-linux-gnu`.
            if path.is_dir() && path.to_string_lossy().contains("-linux-") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Writes a script that runs `line` with the libraries unpacked below `root`. It knows `$here`, its own directory, and
/// `$root`, both found when it runs, so the whole tree may be moved.
pub fn write_wrapper(script: &Path, root: &Path, line: &str) -> Result<()> {
    let directory = script.parent().context("a script lies in a directory")?;
    process::write_script(script, &wrapper(directory, root, &libraries_below(root)?, line)?)
}

fn wrapper(directory: &Path, root: &Path, libraries: &[PathBuf], line: &str) -> Result<String> {
    let up = relative(directory, root)?;
    let below = libraries.iter().map(|path| Ok(format!("$root/{}", path.strip_prefix(root)?.display())));
    let libraries = below.collect::<Result<Vec<_>>>()?.join(":");
    let export = match libraries.as_str() {
        "" => String::new(),
        _ => format!("export LD_LIBRARY_PATH=\"{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\"\n"),
    };
    Ok(format!(
        "#!/bin/sh\n\
         here=$(CDPATH= cd -- \"$(dirname -- \"$0\")\" && pwd)\n\
         root=$here/{up}\n\
         {export}{line}\n",
        up = up.display(),
    ))
}

/// The way from directory `from` to `to`.
fn relative(from: &Path, to: &Path) -> Result<PathBuf> {
    let shared = from.ancestors().find(|ancestor| to.starts_with(ancestor)).context("the paths share no ancestor")?;
    let ups = from.strip_prefix(shared)?.components().map(|_| Component::ParentDir);
    let way: PathBuf = ups.chain(to.strip_prefix(shared)?.components()).collect();
    Ok(if way.as_os_str().is_empty() { ".".into() } else { way })
}

/// Read after the system's own configuration, so it has the last word. Hooks of the system would run on its files.
fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "Dir::State::Lists \"{directory}/lists\";\n\
         Dir::Cache \"{directory}\";\n\
         Dir::Cache::archives \"{directory}/archives\";\n\
         Dir::Cache::pkgcache \"pkgcache.bin\";\n\
         APT::Sandbox::User \"root\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::Retries \"3\";\n\
         #clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n\
         #clear DPkg::Post-Invoke;\n"
    )
}

/// Lines of `apt-cache depends`: `  Depends: name`, where `<name>` is virtual and ` |` opens an alternative.
fn parse_depends(printed: &str) -> Vec<String> {
    let names = printed.lines().filter_map(|line| line.trim_start_matches([' ', '|']).strip_prefix("Depends: "));
    names.filter(|name| !name.starts_with('<')).map(str::to_owned).collect()
}

/// Lines of `--print-uris`: `'uri' file bytes [hash]`; everything else is talk.
fn parse_uris(printed: &str) -> Vec<Archive> {
    printed.lines().filter_map(parse_uri).collect()
}

fn parse_uri(line: &str) -> Option<Archive> {
    let (_uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    let (file, rest) = rest.split_once(' ')?;
    let bytes = rest.split(' ').next()?.parse().ok()?;
    let (package, _version) = file.split_once('_')?;
    Some(Archive { package: package.to_owned(), file: file.to_owned(), bytes })
}

fn describe(archives: &[Archive]) -> String {
    let bytes: u64 = archives.iter().map(|archive| archive.bytes).sum();
    let names: Vec<_> = archives.iter().map(|archive| archive.package.as_str()).collect();
    format!("{} Debian packages, {} MB ({})", archives.len(), bytes.div_ceil(1_000_000), names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_are_read_without_conflicts_and_virtual_packages() {
        let printed =
            "rustc-web\n  Depends: libc6\n |Depends: gcc\n  Depends: <libc-dev>\n    libc6-dev\n  Conflicts: rustc\n";
        assert_eq!(parse_depends(printed), ["libc6", "gcc"]);
    }

    #[test]
    fn archives_are_read_with_and_without_a_hash_between_talk() {
        let printed = "Reading package lists...\n\
            'mirror/a.deb' mysql-common_5.8+1.1.0_all.deb 6636 MD5Sum:2cf9\n\
            'mirror/b.deb' mariadb-common_1%3a10.11.19-0_all.deb 27624 \n\
            Need to get 34.3 kB of archives.\n";
        let archives = parse_uris(printed);
        let read: Vec<_> = archives.iter().map(|archive| (archive.package.as_str(), archive.bytes)).collect();
        assert_eq!(read, [("mysql-common", 6636), ("mariadb-common", 27624)]);
        assert_eq!(archives[1].file, "mariadb-common_1%3a10.11.19-0_all.deb");
        assert_eq!(describe(&archives), "2 Debian packages, 1 MB (mysql-common, mariadb-common)");
    }

    #[test]
    fn the_configuration_keeps_all_state_in_the_directory() {
        let text = configuration(Path::new("/w/target/apt"));
        assert!(text.contains("Dir::State::Lists \"/w/target/apt/lists\";"));
        assert!(text.contains("Dir::Cache::archives \"/w/target/apt/archives\";"));
    }

    #[test]
    fn library_directories_are_the_multiarch_ones() {
        let root = tempfile::tempdir().unwrap();
        for directory in ["usr/lib/x86_64-linux-gnu", "usr/lib/mysql", "lib/x86_64-linux-gnu"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        let expected = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|path| root.path().join(path));
        assert_eq!(library_directories(root.path()).unwrap(), expected);
    }

    #[test]
    fn where_the_system_has_all_libraries_a_wrapper_changes_nothing() {
        let text = wrapper(Path::new("/w/p/scripts"), Path::new("/w/p"), &[], "exec x").unwrap();
        assert!(text.ends_with("root=$here/..\nexec x\n"), "{text}");
    }

    #[test]
    fn a_wrapper_finds_its_libraries_from_where_it_lies() {
        let tree = tempfile::tempdir().unwrap();
        let (root, scripts) = (tree.path().join("first/rustc"), tree.path().join("first/linker"));
        fs::create_dir_all(root.join("usr/lib/x86_64-linux-gnu")).unwrap();
        fs::create_dir_all(&scripts).unwrap();
        write_wrapper(&scripts.join("show"), &root, "ls -d \"$LD_LIBRARY_PATH\" \"$here\" \"$1\"").unwrap();
        let moved = tree.path().join("second");
        fs::rename(tree.path().join("first"), &moved).unwrap();
        let mut command = Command::new(moved.join("linker/show"));
        let printed = process::capture(command.arg("/").env_remove("LD_LIBRARY_PATH"), "the script").unwrap();
        assert_eq!(printed.lines().count(), 3, "{printed}");
    }
}
