//! Which files are read, how, and what `load` says about those it cannot read.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use egress_agent::policy::{
    PolicySet,
    code::Code,
    load::{LoadError, LoadOptions, Loaded, MAX_FILE, MAX_TOTAL, load, load_text, watched},
};
use tempfile::TempDir;

fn entry(name: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec: {{hosts: [{name}.example.com]}}\n"
    )
}

fn write(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, text).unwrap();
    path
}

fn read(paths: &[&Path]) -> Loaded {
    let paths: Vec<PathBuf> = paths.iter().map(|path| path.to_path_buf()).collect();
    load(&paths, &LoadOptions::default()).unwrap()
}

/// The directories in which a change is noticed.
fn directories(path: &Path) -> Vec<PathBuf> {
    watched(&[path.to_path_buf()]).directories().map(Path::to_path_buf).collect()
}

fn names(policies: &PolicySet) -> Vec<&str> {
    policies.service_entries.iter().map(|entry| &*entry.object.name).collect()
}

fn codes(loaded: &Loaded) -> Vec<Code> {
    loaded.findings.iter().map(|finding| finding.code).collect()
}

#[test]
fn directories_are_read_recursively_and_dot_files_are_not() {
    let root = TempDir::new().unwrap();
    for name in
        ["b.yaml", "a.yml", "c.json", "deep/er/d.yaml", ".hidden.yaml", ".git/e.yaml", "f.txt", "g.yaml~", "README"]
    {
        write(root.path(), name, &entry(Path::new(name).file_stem().unwrap().to_str().unwrap()));
    }
    let loaded = read(&[root.path()]);
    assert_eq!(names(&loaded.policies), ["a", "b", "c", "d"]);
    assert_eq!((loaded.files, loaded.documents, loaded.findings.len()), (4, 4, 0));
    let watched = directories(root.path());
    let root = fs::canonicalize(root.path()).unwrap();
    for directory in [root.clone(), root.join("deep"), root.join("deep/er")] {
        assert!(watched.contains(&directory), "{directory:?} in {watched:?}");
    }
}

#[test]
fn a_named_file_is_read_whatever_its_name() {
    let root = TempDir::new().unwrap();
    let path = write(root.path(), "policy", &entry("a"));
    let loaded = read(&[&path]);
    assert_eq!(names(&loaded.policies), ["a"]);
    let directory = fs::canonicalize(root.path()).unwrap();
    let watched = watched(std::slice::from_ref(&path));
    assert!(watched.directories().any(|watched| watched == directory));
    assert!(watched.concerns(&directory, "policy".as_ref()) && !watched.concerns(&directory, "other".as_ref()));
}

#[test]
fn config_map_mounts_are_read_once_and_watched_where_they_change() {
    let root = TempDir::new().unwrap();
    write(root.path(), "..2024_01_01/x.yaml", &entry("x"));
    symlink("..2024_01_01", root.path().join("..data")).unwrap();
    symlink("..data/x.yaml", root.path().join("x.yaml")).unwrap();
    let loaded = read(&[root.path()]);
    assert_eq!((names(&loaded.policies), loaded.findings.len()), (vec!["x"], 0));
    assert_eq!(&*loaded.policies.service_entries[0].at.file, root.path().join("x.yaml"));
    let watched = directories(root.path());
    let root = fs::canonicalize(root.path()).unwrap();
    assert!(watched.contains(&root) && watched.contains(&root.join("..2024_01_01")));
}

#[test]
fn links_that_lead_in_a_circle_end() {
    let root = TempDir::new().unwrap();
    write(root.path(), "a/x.yaml", &entry("x"));
    symlink("..", root.path().join("a/up")).unwrap();
    symlink("a", root.path().join("b")).unwrap();
    symlink("loop.yaml", root.path().join("loop.yaml")).unwrap();
    let loaded = read(&[root.path()]);
    assert_eq!(names(&loaded.policies), ["x"]);
    assert_eq!(codes(&loaded), [Code::Unreadable]);
}

#[test]
fn links_to_other_places_are_followed_and_watched() {
    let (root, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let target = write(other.path(), "v1/x.yaml", &entry("x"));
    symlink("v1", other.path().join("current")).unwrap();
    symlink(other.path().join("current/x.yaml"), root.path().join("x.yaml")).unwrap();
    let loaded = read(&[root.path()]);
    assert_eq!(names(&loaded.policies), ["x"]);
    let watched = directories(root.path());
    for directory in [root.path(), other.path(), target.parent().unwrap()] {
        assert!(watched.contains(&fs::canonicalize(directory).unwrap()), "{directory:?}");
    }
}

#[test]
fn one_bad_file_hides_nothing_of_the_others() {
    let root = TempDir::new().unwrap();
    write(root.path(), "a.yaml", "a: b: c\n");
    fs::write(root.path().join("b.yaml"), b"a: b\nc: \xff\n").unwrap();
    symlink("nowhere", root.path().join("c.yaml")).unwrap();
    write(root.path(), "d.yaml", &format!("{}---\na: b: c\n---\n{}", entry("d"), entry("e")));
    let loaded = read(&[root.path()]);
    assert_eq!(codes(&loaded), [Code::Syntax, Code::NotUtf8, Code::Unreadable, Code::Syntax]);
    let places: Vec<(u32, u32)> = loaded.findings.iter().map(|finding| (finding.line, finding.column)).collect();
    assert_eq!(places, [(1, 5), (2, 4), (0, 0), (6, 5)]);
    assert_eq!(names(&loaded.policies), ["d", "e"]);
    assert!(loaded.has_errors());
}

#[test]
fn the_same_file_is_read_once_and_order_does_not_matter() {
    let root = TempDir::new().unwrap();
    let (a, b) = (write(root.path(), "a.yaml", &entry("a")), write(root.path(), "b.yaml", &entry("b")));
    let (first, second) = (read(&[root.path(), &a, &a]), read(&[&b, &a]));
    assert_eq!((first.files, &first.policies), (2, &second.policies));
}

#[test]
fn a_second_document_of_the_same_name_is_an_error_that_names_both() {
    let root = TempDir::new().unwrap();
    write(root.path(), "a.yaml", &entry("x"));
    write(root.path(), "b.yaml", &format!("---\n{}", entry("x")));
    let loaded = read(&[root.path()]);
    let finding = &loaded.findings[0];
    assert_eq!((finding.code, finding.line, loaded.findings.len()), (Code::DuplicateObject, 2, 1));
    let first = root.path().join("a.yaml");
    assert!(finding.message.contains(&format!("{}:1:1", first.display())), "{}", finding.message);
}

#[test]
fn a_missing_path_is_an_error_that_names_it() {
    let error = load(&[PathBuf::from("/no/such/policy")], &LoadOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot read /no/such/policy");
    assert!(matches!(error, LoadError::Unreadable { .. }));
    assert!(matches!(load(&[], &LoadOptions::default()), Err(LoadError::NoPath)));
}

#[test]
fn an_empty_directory_is_an_empty_policy() {
    let root = TempDir::new().unwrap();
    let loaded = read(&[root.path()]);
    assert_eq!((loaded.files, loaded.policies), (0, PolicySet::default()));
}

/// Root's own files are safe; the test needs root to make any.
#[test]
fn files_that_others_can_change_are_refused_where_that_is_asked() {
    let root = TempDir::new().unwrap();
    let path = write(root.path(), "a.yaml", &entry("a"));
    let options = LoadOptions { require_root_owned: true, follow: false };
    let refusals = |path: &Path| codes(&load(&[path.to_path_buf()], &options).unwrap());
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    set(&path, 0o666);
    assert_eq!(refusals(&path), [Code::UnsafeOwner]);
    set(&path, 0o644);
    set(root.path(), 0o777);
    assert_eq!(refusals(&path), [Code::UnsafeOwner]);
    set(root.path(), 0o755);
    let owner_is_root = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&path).unwrap()) == 0;
    assert_eq!(refusals(&path), if owner_is_root { vec![] } else { vec![Code::UnsafeOwner] });
}

#[test]
fn sizes_are_bounded() {
    let root = TempDir::new().unwrap();
    write(root.path(), "a.yaml", &entry("a"));
    fs::File::create(root.path().join("b.yaml")).unwrap().set_len(MAX_FILE + 1).unwrap();
    let loaded = read(&[root.path()]);
    assert_eq!((codes(&loaded), names(&loaded.policies)), (vec![Code::FileTooLarge], vec!["a"]));
    for number in 0..5 {
        let file = fs::File::create(root.path().join(format!("c{number}.yaml"))).unwrap();
        file.set_len(MAX_FILE - 1).unwrap();
    }
    let too_large = codes(&read(&[root.path()])).iter().filter(|code| **code == Code::FileTooLarge).count();
    assert_eq!(too_large, 3, "b, and the two that go beyond {MAX_TOTAL} bytes");
}

#[test]
fn every_notation_reads_the_same() {
    let yaml = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata:\n  name: a\nspec:\n  hosts:\n  - a.example.com\n  addresses: [10.0.0.1]\n  ports:\n  - {number: 443, name: tls, protocol: TLS}\n";
    let json = r#"{"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "a"},
        "spec": {"hosts": ["a.example.com"], "addresses": ["10.0.0.1"],
        "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]}}"#;
    let comments = format!("# before\n---\n{}...\n# after\n", yaml.replace("kind", "# a comment\nkind"));
    let anchors = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: &a a}\nx: &port {number: 1, name: tls, protocol: TLS}\n";
    let anchors = anchors.replace("x: &port {number: 1, name: tls, protocol: TLS}\n", "spec: {hosts: &h [a.example.com], addresses: [&ip 10.0.0.1], ports: [{<<: {number: 1, name: tls}, number: 443, protocol: TLS}]}\n");
    let list = format!("{{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{json}]}}");
    let expected = load_text("a", yaml).policies.service_entries;
    let variants = [
        json.to_owned(),
        comments,
        anchors,
        list,
        yaml.replace('\n', "\r\n"),
        yaml.replace('\n', "\r"),
        format!("\u{feff}{yaml}"),
    ];
    for text in variants {
        let loaded = load_text("a", &text);
        assert_eq!(codes(&loaded), [], "{text}");
        let [read] = &loaded.policies.service_entries[..] else { panic!("{text}") };
        let (ports, expected_ports) = (&read.ports[0], &expected[0].ports[0]);
        assert_eq!(
            (&read.object, &read.hosts, &read.addresses),
            (&expected[0].object, &expected[0].hosts, &expected[0].addresses)
        );
        assert_eq!(
            (ports.number, &ports.name, ports.app_protocol),
            (expected_ports.number, &expected_ports.name, expected_ports.app_protocol)
        );
    }
}
