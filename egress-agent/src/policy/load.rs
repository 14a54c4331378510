//! From paths to a [`PolicySet`]: which files are read, which documents are in them, which objects those are.
//!
//! What is wrong inside a file becomes a [`Finding`]; only what keeps the reading from starting is a [`LoadError`].
//! Bounds: [`MAX_FILE`] for a file, [`MAX_TOTAL`] for all, and those of [`super::yaml`] for a document.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Kind, ObjectName, PolicySet, Position,
    code::Code,
    decode::Decoder,
    diagnostic::{Finding, Severity, printable, quoted},
    egress_policy,
    object::{Role, role},
    path::FieldPath,
    service_entry,
    yaml::{Node, Problem, Span, documents},
};

mod files;

/// Most bytes of one file.
pub const MAX_FILE: u64 = 64 << 20;
/// Most bytes of all files together.
pub const MAX_TOTAL: u64 = 256 << 20;

/// How to read.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Refuse files that others than root can write or replace, as the daemon must.
    pub require_root_owned: bool,
    /// The files are followed: read only regular files, and none that is open for writing and was changed a moment ago.
    pub follow: bool,
}

/// Why nothing could be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A path that was named cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A file is being written.
    #[error("{} is open for writing; it counts when it is closed", path.display())]
    BeingWritten {
        /// The file.
        path: PathBuf,
    },
    /// A file that must be trusted cannot be.
    #[error("cannot use {}: {message}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why, and what helps.
        message: String,
    },
    /// No path was named.
    #[error("no policy file or directory was named")]
    NoPath,
}

/// What was read.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// Every valid document. With errors about, it is not the whole policy.
    pub policies: PolicySet,
    /// What is wrong or worth knowing, by file and position.
    pub findings: Vec<Finding>,
    /// Files that were read.
    pub files: usize,
    /// Documents in them, of whatever kind, list items counted one by one.
    pub documents: usize,
    /// The text of each file that has findings, for underlining.
    pub sources: HashMap<Arc<Path>, Arc<str>>,
    /// How many documents each file has that was read, or is as it was before.
    pub known: BTreeMap<Arc<Path>, usize>,
    /// Files that are being written, and so were not read.
    pub unfinished: Vec<Unfinished>,
}

/// A file that is being written, and so was not read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unfinished {
    /// The file.
    pub path: Arc<Path>,
    /// Whether what it said before still counts; otherwise it is left out.
    pub is_kept: bool,
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.to_string_lossy();
        let file = printable(&path);
        let meanwhile = if self.is_kept { "its content before stays in force" } else { "it is left out" };
        write!(f, "{file} is open for writing: until it is closed, {meanwhile}")
    }
}

/// What becomes of files that are being written.
#[derive(Debug, Clone, Copy)]
pub struct Before<'a> {
    /// What counts of files that were read before.
    pub policies: &'a PolicySet,
    /// Those, each with how many documents it has.
    pub known: &'a BTreeMap<Arc<Path>, usize>,
    /// Others are left out; otherwise nothing is read.
    pub leaves_out: bool,
}

/// What is on disk, as far as it can be told without reading.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fingerprint(BTreeMap<PathBuf, files::Stamp>);

impl Fingerprint {
    /// Of the files that the paths stand for, the directories that hold them, and single files beside.
    pub fn new(paths: &[PathBuf], beside: &[PathBuf]) -> Self {
        let beside = beside.iter().map(|path| (path.clone(), files::Stamp::of(path)));
        Self(files::stamps(paths).into_iter().chain(beside).collect())
    }

    /// The first path at which this and another differ, leaving out files that are being written.
    pub fn difference(&self, other: &Self, without: &[Unfinished]) -> Option<PathBuf> {
        let paths: BTreeSet<&PathBuf> = self.0.keys().chain(other.0.keys()).collect();
        let is_unfinished = |path: &PathBuf| without.iter().any(|file| *file.path == **path);
        paths.into_iter().find(|path| self.0.get(*path) != other.0.get(*path) && !is_unfinished(path)).cloned()
    }
}

impl Loaded {
    /// Whether any document is wrong; the policies are then incomplete.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Error)
    }

    /// The text of the file a finding is about.
    pub fn source(&self, finding: &Finding) -> Option<&str> {
        self.sources.get(&finding.file).map(AsRef::as_ref)
    }
}

/// Directories, and which of their entries matter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watched(BTreeMap<PathBuf, Entries>);

/// Which entries of a directory matter.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entries {
    /// All of them: it is part of the policy.
    All,
    /// These: a path or a link leads through them.
    Named(BTreeSet<OsString>),
}

impl Watched {
    /// The entries that a path leads through, and nothing of what it leads to.
    pub fn path(path: &Path) -> Self {
        let mut watched = Self::default();
        for (directory, name) in files::places_of(path) {
            watched.add_name(directory, name);
        }
        watched
    }

    /// Every entry of a directory matters.
    pub fn add_all(&mut self, directory: PathBuf) {
        self.0.insert(directory, Entries::All);
    }

    /// One entry of a directory matters.
    pub fn add_name(&mut self, directory: PathBuf, name: OsString) {
        match self.0.entry(directory).or_insert_with(|| Entries::Named(BTreeSet::new())) {
            Entries::All => {}
            Entries::Named(names) => drop(names.insert(name)),
        }
    }

    /// The directories, sorted.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.0.keys().map(PathBuf::as_path)
    }

    /// Whether a change of an entry matters.
    pub fn concerns(&self, directory: &Path, name: &OsStr) -> bool {
        match self.0.get(directory) {
            Some(Entries::All) => true,
            Some(Entries::Named(names)) => names.contains(name),
            None => false,
        }
    }
}

/// Reads files and directories. Order and overlap of the paths do not matter.
pub fn load(paths: &[PathBuf], options: &LoadOptions) -> Result<Loaded, LoadError> {
    load_after(paths, options, Before { policies: &PolicySet::default(), known: &BTreeMap::new(), leaves_out: false })
}

/// The same where files were read before: of one that is being written, that counts which it said then.
pub fn load_after(paths: &[PathBuf], options: &LoadOptions, before: Before<'_>) -> Result<Loaded, LoadError> {
    if paths.is_empty() {
        return Err(LoadError::NoPath);
    }
    let mut loader = Loader::default();
    let mut left = MAX_TOTAL;
    for mut found in files::find(paths, &mut Watched::default())? {
        let file: Arc<Path> = Arc::from(found.path.as_path());
        match files::read(&mut found, options, &mut left) {
            Ok(text) => loader.read(&file, &text),
            Err(files::ReadError::Finding(code, message, help)) => {
                loader.files += 1;
                loader.findings.push(Finding::about_file(code, &file, message).with_help(help));
            }
            Err(files::ReadError::Gone) => {}
            Err(files::ReadError::BeingWritten) => loader.unfinished(&file, before)?,
            Err(files::ReadError::Named(cause)) => return Err(LoadError::Unreadable { path: found.path, cause }),
        }
    }
    Ok(loader.finish())
}

/// Whether a file is being written, and not to be read yet.
pub fn is_unfinished(path: &Path) -> bool {
    files::is_unfinished(path)
}

/// Reads one text as if it were a file, for whoever has no file.
pub fn load_text(file_name: impl AsRef<Path>, text: &str) -> Loaded {
    let mut loader = Loader::default();
    loader.read(&Arc::from(file_name.as_ref()), text.as_bytes());
    loader.finish()
}

/// Reads one object of the Kubernetes API. It stands in no file, and unknown fields are ignored.
pub fn read_object(text: &str) -> Loaded {
    let (mut loader, nowhere) = (Loader::default(), Position::nowhere().file);
    loader.read_documents(Decoder::of_object(&nowhere), text);
    loader.finish()
}

/// Reads one file, of which holds what holds of policies that are followed: nobody but root can change it, and nobody does.
pub fn read_trusted(path: &Path) -> Result<Vec<u8>, LoadError> {
    let options = LoadOptions { require_root_owned: true, follow: true };
    let path = path.to_owned();
    files::read(&mut files::Found::named(path.clone()), &options, &mut MAX_TOTAL.clone()).map_err(|error| match error {
        files::ReadError::Finding(Code::UnsafeOwner, message, help) => {
            LoadError::Unfit { path, message: format!("{message}: {help}") }
        }
        files::ReadError::Finding(_, message, _) => LoadError::Unfit { path, message },
        files::ReadError::BeingWritten => LoadError::BeingWritten { path },
        files::ReadError::Named(cause) => LoadError::Unreadable { path, cause },
        // Of one that is named, that is an error.
        files::ReadError::Gone => LoadError::Unreadable { path, cause: io::ErrorKind::NotFound.into() },
    })
}

/// Where a change can change the result of [`load`], found without reading any file: for inotify.
pub fn watched(paths: &[PathBuf]) -> Watched {
    let mut watched = Watched::default();
    // What cannot be found is watched as far as it is there; reading it gives the error.
    let _ = files::find(paths, &mut watched);
    watched
}

#[derive(Default)]
struct Loader {
    policies: PolicySet,
    names: HashMap<ObjectName, Position>,
    findings: Vec<Finding>,
    files: usize,
    documents: usize,
    sources: HashMap<Arc<Path>, Arc<str>>,
    known: BTreeMap<Arc<Path>, usize>,
    unfinished: Vec<Unfinished>,
}

impl Loader {
    fn read(&mut self, file: &Arc<Path>, bytes: &[u8]) {
        let before = self.documents;
        self.read_text(file, bytes);
        self.known.insert(Arc::clone(file), self.documents - before);
    }

    /// A file that is being written: what it said before counts, if that is known.
    fn unfinished(&mut self, file: &Arc<Path>, before: Before<'_>) -> Result<(), LoadError> {
        let known = before.known.get(file);
        if known.is_none() && !before.leaves_out {
            return Err(LoadError::BeingWritten { path: file.to_path_buf() });
        }
        if let Some(&documents) = known {
            self.documents += documents;
            self.known.insert(Arc::clone(file), documents);
            self.keep(file, before.policies);
        }
        self.unfinished.push(Unfinished { path: Arc::clone(file), is_kept: known.is_some() });
        Ok(())
    }

    /// Takes over what a file said before.
    fn keep(&mut self, file: &Arc<Path>, before: &PolicySet) {
        let PolicySet { service_entries, egress_policies, .. } = before;
        for entry in service_entries.iter().filter(|entry| entry.at.file == *file) {
            if self.is_still_new(&entry.object, &entry.at) {
                self.policies.service_entries.push(entry.clone());
            }
        }
        for policy in egress_policies.iter().filter(|policy| policy.at.file == *file) {
            if self.is_still_new(&policy.object, &policy.at) {
                self.policies.egress_policies.push(policy.clone());
            }
        }
    }

    /// As [`Self::is_new`] for a document of a file that is being written: it may have come to another file meanwhile.
    fn is_still_new(&mut self, object: &ObjectName, at: &Position) -> bool {
        let Some(first) = self.names.get(object) else {
            self.names.insert(object.clone(), at.clone());
            return true;
        };
        let message = format!("{} exists already, at {first}", quoted(&object.to_string()));
        let span = Span { line: at.line, column: at.column, length: 0 };
        let finding = Finding::at(Code::DuplicateObject, &at.file, span, message)
            .with_help("the file is open for writing: close it, so that it is read");
        self.findings.push(Finding { related: Some((first.clone(), "first here")), ..finding });
        false
    }

    fn read_text(&mut self, file: &Arc<Path>, bytes: &[u8]) {
        self.files += 1;
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let finding = not_utf8(file, bytes, error.valid_up_to());
                self.sources.insert(Arc::clone(file), String::from_utf8_lossy(bytes).into());
                return self.findings.push(finding);
            }
        };
        let before = self.findings.len();
        self.read_documents(Decoder::new(file), text);
        if self.findings.len() > before {
            self.sources.insert(Arc::clone(file), text.into());
        }
    }

    fn read_documents(&mut self, mut decoder: Decoder<'_>, text: &str) {
        for document in documents(text) {
            self.documents += usize::from(document.root.is_some() || !document.problems.is_empty());
            for Problem { code, span, message, help } in document.problems {
                decoder.push(Finding { help, ..Finding::at(code, decoder.file(), span, message) });
            }
            if let Some(root) = document.root {
                self.object(&mut decoder, &root, &FieldPath::Root);
            }
        }
        self.findings.extend(decoder.into_findings());
    }

    fn object(&mut self, decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) {
        match role(decoder, node, path) {
            Role::None => {}
            Role::List => self.list(decoder, node, path),
            Role::Policy(Kind::ServiceEntry) => {
                if let Some(entry) = service_entry::decode(decoder, node, path)
                    && self.is_new(decoder, &entry.object, node.span, path)
                {
                    self.policies.service_entries.push(entry);
                }
            }
            Role::Policy(Kind::EgressPolicy) => {
                if let Some(policy) = egress_policy::decode(decoder, node, path)
                    && self.is_new(decoder, &policy.object, node.span, path)
                {
                    self.policies.egress_policies.push(policy);
                }
            }
        }
    }

    fn list(&mut self, decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) {
        let Some(items) = node.get("items") else {
            return decoder.missing(Code::MissingField, node.span, &path.field("items"), "a list has `items`");
        };
        let path = path.field("items");
        let items = decoder.items(items, &path).unwrap_or_default();
        self.documents = (self.documents + items.len()).saturating_sub(1);
        for (index, item) in items.iter().enumerate() {
            self.object(decoder, item, &path.item(index));
        }
    }

    /// Whether no other document has this name; the second of two is reported.
    fn is_new(&mut self, decoder: &mut Decoder<'_>, object: &ObjectName, span: Span, path: &FieldPath<'_>) -> bool {
        let position = decoder.position(span);
        if let Some(first) = self.names.get(object) {
            let message = format!("{} exists already, at {first}", quoted(&object.to_string()));
            let related = Some((first.clone(), "first here"));
            let finding = Finding::at(Code::DuplicateObject, &position.file, span, message)
                .with_path(path.field("metadata").field("name").to_string())
                .with_help("give one of them another name or namespace, or delete it");
            decoder.push(Finding { related, ..finding });
            return false;
        }
        self.names.insert(object.clone(), position);
        true
    }

    fn finish(self) -> Loaded {
        let Self { mut policies, findings, files, documents, sources, known, unfinished, .. } = self;
        policies.service_entries.sort_by(|a, b| a.object.cmp(&b.object));
        policies.egress_policies.sort_by(|a, b| a.object.cmp(&b.object));
        Loaded { policies, findings, files, documents, sources, known, unfinished }
    }
}

fn not_utf8(file: &Arc<Path>, bytes: &[u8], valid: usize) -> Finding {
    if matches!(bytes, [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) {
        let finding = Finding::about_file(Code::NotUtf8, file, "the file is UTF-16");
        return finding.with_help("convert it: iconv -f utf-16 -t utf-8");
    }
    let before = String::from_utf8_lossy(&bytes[..valid]);
    let span = super::yaml::end_of(before.strip_prefix('\u{feff}').unwrap_or(&before));
    Finding::at(Code::NotUtf8, file, span, format!("the byte 0x{:02X} is not UTF-8 text", bytes[valid]))
        .with_help("convert the file to UTF-8, for example with iconv")
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        fs::File,
        io::Write,
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;

    const FOLLOW: LoadOptions = LoadOptions { require_root_owned: false, follow: true };

    fn entry(name: &str, address: &str) -> String {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: {name} }}\n\
             spec: {{ hosts: [a.example.com], addresses: [{address}], ports: [{{ number: 80, name: http }}] }}\n"
        )
    }

    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            let files = Self(tempfile::tempdir().unwrap());
            fs::write(files.path("a.yaml"), entry("first", "192.0.2.1")).unwrap();
            fs::write(files.path("b.yaml"), entry("second", "192.0.2.2")).unwrap();
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn open(&self, name: &str) -> File {
            let mut file = File::create(self.path(name)).unwrap();
            file.write_all(b"half of").unwrap();
            file
        }

        fn load(&self, before: &Loaded, leaves_out: bool) -> Result<Loaded, LoadError> {
            let before = Before { policies: &before.policies, known: &before.known, leaves_out };
            load_after(&[self.0.path().to_owned()], &FOLLOW, before)
        }
    }

    fn names(loaded: &Loaded) -> Vec<String> {
        loaded.policies.service_entries.iter().map(|entry| entry.object.name.to_string()).collect()
    }

    /// Does some work while another thread does something over and over.
    fn beside<T>(over_and_over: impl Fn() + Sync, work: impl FnOnce() -> T) -> T {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    over_and_over();
                }
            });
            let done = work();
            is_over.store(true, Ordering::Relaxed);
            done
        })
    }

    #[test]
    fn what_a_file_said_before_counts_while_it_is_written() {
        let files = Files::new();
        let before = files.load(&Loaded::default(), false).unwrap();
        let open = files.open("a.yaml");
        fs::write(files.path("b.yaml"), entry("third", "192.0.2.3")).unwrap();
        let during = files.load(&before, false).unwrap();
        assert_eq!((names(&during), during.documents), (vec!["first".to_owned(), "third".to_owned()], 2));
        assert!(during.unfinished.len() == 1 && during.unfinished[0].is_kept, "{:?}", during.unfinished);
        // As long as it takes.
        assert_eq!(names(&files.load(&during, false).unwrap()), names(&during));
        drop(open);
        assert!(files.load(&during, false).unwrap().has_errors());
    }

    /// A writer that comes after the first look, and truncates what is read then.
    #[test]
    fn half_of_a_file_is_never_read_whenever_its_writer_comes() {
        let files = Files::new();
        let texts = ["first", "other"].map(|name| {
            let document = |number| format!("---\n{}", entry(&format!("{name}-{number}"), "192.0.2.1"));
            (0..200).map(document).collect::<Vec<_>>().concat()
        });
        let path = files.path("a.yaml");
        fs::write(&path, &texts[0]).unwrap();
        let write = || texts.iter().for_each(|text| fs::write(&path, text).unwrap());
        let read = beside(write, || {
            let mut read = Vec::new();
            while read.len() < 5 {
                if let Ok(loaded) = files.load(&Loaded::default(), false) {
                    let found = loaded.policies.service_entries.iter();
                    read.push(found.filter(|entry| entry.object.name.contains('-')).count());
                }
            }
            read
        });
        assert!(read.iter().all(|&count| count == 200), "{read:?}");
    }

    /// A file that goes between the listing of its directory and its reading was not there; the others count.
    #[test]
    fn a_file_that_is_removed_meanwhile_is_no_error() {
        let files = Files::new();
        let come_and_go = || {
            fs::write(files.path(".next"), entry("coming", "192.0.2.1")).unwrap();
            fs::rename(files.path(".next"), files.path("c.yaml")).unwrap();
            fs::remove_file(files.path("c.yaml")).unwrap();
        };
        let load = || (0..2_000).map(|_| files.load(&Loaded::default(), false)).collect::<Vec<_>>();
        for loaded in beside(come_and_go, load) {
            let loaded = match loaded {
                Ok(loaded) => loaded,
                // It went while it was read, so all is read again.
                Err(LoadError::BeingWritten { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            assert!(!loaded.has_errors(), "{:?}", loaded.findings);
            let names = names(&loaded);
            let stay = ["first", "second"];
            assert!(stay.iter().all(|name| names.iter().any(|found| found == name)), "{names:?}");
        }
    }

    #[test]
    fn a_new_file_holds_the_others_back_or_is_left_out() {
        let files = Files::new();
        let before = files.load(&Loaded::default(), false).unwrap();
        let _open = files.open("c.yaml");
        let held = files.load(&before, false).unwrap_err();
        assert!(matches!(&held, LoadError::BeingWritten { path } if path.ends_with("c.yaml")), "{held}");
        let left_out = files.load(&before, true).unwrap();
        assert_eq!(names(&left_out), ["first", "second"]);
        assert!(!left_out.unfinished[0].is_kept);
    }

    #[test]
    fn a_document_that_came_to_another_file_meanwhile_is_an_error() {
        for other in ["0.yaml", "z.yaml"] {
            let files = Files::new();
            let before = files.load(&Loaded::default(), false).unwrap();
            let _open = files.open("a.yaml");
            fs::write(files.path(other), entry("first", "192.0.2.3")).unwrap();
            let codes: Vec<Code> =
                files.load(&before, false).unwrap().findings.iter().map(|found| found.code).collect();
            assert_eq!(codes, [Code::DuplicateObject], "{other}");
        }
    }

    #[test]
    fn a_fingerprint_tells_what_changed() {
        let files = Files::new();
        let print = || Fingerprint::new(&[files.0.path().to_owned()], &[]);
        let before = print();
        assert_eq!(print().difference(&before, &[]), None);
        fs::write(files.path("ignored"), "x").unwrap();
        assert_eq!(print().difference(&before, &[]), None);
        fs::write(files.path("b.yaml"), "longer than before").unwrap();
        assert_eq!(print().difference(&before, &[]), Some(files.path("b.yaml")));
        let unfinished = [Unfinished { path: files.path("b.yaml").into(), is_kept: true }];
        assert_eq!(print().difference(&before, &unfinished), None);
        fs::remove_file(files.path("a.yaml")).unwrap();
        assert_eq!(print().difference(&before, &unfinished), Some(files.path("a.yaml")));
        fs::remove_dir_all(files.0.path()).unwrap();
        assert!(print().difference(&before, &[]).is_some());
        fs::create_dir(files.0.path()).unwrap();
    }
}
