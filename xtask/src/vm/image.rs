//! The root file system of a machine: an initramfs (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{process, workspace::Workspace};

/// What the kernels have as modules and the tests use, each after what it needs.
const MODULES: [&str; 17] = [
    "libcrc32c",
    "udp_tunnel",
    "ip6_udp_tunnel",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "mptcp_diag",
    "veth",
    "sctp",
    "vxlan",
    "l2tp_core",
    "l2tp_ip",
    "l2tp_ip6",
    "dccp",
    "dccp_ipv4",
    "dccp_ipv6",
];

/// Programs of the system that tests call and busybox does not replace.
const PROGRAMS: [&str; 3] = ["ip", "nice", "unshare"];

/// Programs of the tests' own, beside the test files.
const ACTORS: [&str; 7] = ["actor", "asker", "dial", "escapee", "flood", "hammer", "quic"];

/// The first process where there is no systemd: it makes ready what systemd would, and runs the tests.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t securityfs security /sys/kernel/security
mkdir -p /run/netns /dev/shm
ln -s /proc/self/fd /dev/fd
ip link set lo up
# The tests and their agents run below the root, as on a host.
mkdir /sys/fs/cgroup/tests && echo 1 > /sys/fs/cgroup/tests/cgroup.procs
. /run-tests
";

/// The first process where there is systemd: systemd.
const INIT_SYSTEMD: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
exec /usr/lib/systemd/systemd
";

/// What systemd starts: no logins, which would wait for devices.
const DEFAULT_TARGET: &str = "[Unit]
Requires=basic.target egress-tests.service
";

/// The tests as a service.
const SERVICE: &str = "[Service]
Type=oneshot
TimeoutStartSec=infinity
Environment=PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
ExecStart=/bin/sh /run-tests
StandardOutput=file:/dev/console
StandardError=inherit
";

/// Runs the tests, prints what [`mod@super::report`] reads, and ends the machine.
const RUN_TESTS: &str = r#"
# Ends a line that systemd began, which resets the console.
echo
for module in $(cat /modules/order); do insmod /modules/$module.ko 2>/dev/null || echo "=== LACKS $module"; done
. /environment
echo "=== KERNEL $(uname -r) $(uname -v)"
grep -q bpf /sys/kernel/security/lsm 2>/dev/null && echo "=== LSM bpf"
test -d /run/systemd/system && echo "=== SYSTEMD $(systemctl --version | head -n 1)"
cd "$WORK"
while read -r name program; do
    echo "=== RUN $name"
    timeout -k 5 "$PATIENCE" "$program" --test-threads=2 $OPTIONS "$@" 2>&1 < /dev/null
    echo "=== EXIT $name $?"
done < /tests
echo "=== DONE"
echo o > /proc/sysrq-trigger
sleep 60
"#;

/// What is to be run in the machine.
pub struct Tests<'a> {
    /// Test files of `egress-tests`.
    pub files: Vec<&'static str>,
    /// Whether they are marked `#[ignore]`, since they can be run in such a machine alone.
    pub are_ignored: bool,
    /// For each of them.
    pub arguments: &'a [OsString],
    /// Of the environment, beside those that lead tests to what they run.
    pub variables: &'a [(&'static str, OsString)],
    /// How long each of them may take.
    pub patience: Duration,
}

impl Tests<'_> {
    /// How long all of them may take, with the machine's start.
    pub fn longest(&self) -> Duration {
        self.patience * u32::try_from(self.files.len()).unwrap_or(u32::MAX) + Duration::from_mins(1)
    }
}

enum Node {
    Directory,
    Program(PathBuf),
    Text(Vec<u8>, u32),
    /// With what it leads to.
    Link(PathBuf),
}

/// Directories that are links to those of the same name below `usr`, as everywhere since Debian 12.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// What an initramfs is to hold, by path.
pub struct Image {
    nodes: BTreeMap<PathBuf, Node>,
}

impl Image {
    /// With a shell, and the modules of a kernel.
    pub fn new(workspace: &Workspace, busybox: &Path, kernel: &Path) -> Result<Self> {
        let mut image = Self { nodes: BTreeMap::new() };
        for directory in ["dev", "proc", "sys", "run", "tmp", "root", "var/tmp", "etc", "modules"] {
            image.put(directory, Node::Directory);
        }
        for directory in MERGED {
            let usr = Path::new("usr").join(directory);
            image.nodes.insert(directory.into(), Node::Link(usr.clone()));
            image.put(usr, Node::Directory);
        }
        image.put("dev/console", Node::Text(Vec::new(), CONSOLE));
        let busybox = find(busybox, |name| name == "busybox").context("busybox-static has no busybox")?;
        image.put("bin/busybox", Node::Program(busybox));
        image.put("init", Node::Text(INIT.into(), 0o100_755));
        image.text("run-tests", RUN_TESTS);
        image.text("etc/hosts", "127.0.0.1 localhost\n");
        image.text("etc/resolv.conf", "nameserver 127.0.0.1\n");
        for file in ["etc/passwd", "etc/group", "etc/nsswitch.conf"] {
            image.text(file, &fs::read_to_string(Path::new("/").join(file)).unwrap_or_default());
        }
        image.put_modules(workspace, kernel)?;
        for program in PROGRAMS {
            let program = process::find(program).with_context(|| format!("{program} is needed"))?;
            image.program(&program)?;
        }
        Ok(image)
    }

    /// With systemd as the first process, from packages that are unpacked at `root`; it runs the tests as a service.
    pub fn with_systemd(mut self, workspace: &Workspace, root: &Path) -> Result<Self> {
        let is_needed = |path: &Path| !path.starts_with("usr/share") && !path.starts_with("var");
        // There is one C library for both: the newer one, which also serves programs that were made with an older one.
        let is_newer_here = !can_run(root, &workspace.agent())?;
        for path in files(root)?.into_iter().filter(|path| is_needed(path)) {
            let (file, here) = (root.join(&path), Path::new("/").join(&path));
            let node = match fs::read_link(&file) {
                Ok(target) => Node::Link(target),
                Err(_) if is_newer_here && here.is_file() => Node::Program(here),
                Err(_) => Node::Program(file),
            };
            self.put(path, node);
        }
        self.put("init", Node::Text(INIT_SYSTEMD.into(), 0o100_755));
        self.text("etc/machine-id", "e9e55e9e55e9e55e9e55e9e55e9e55e9\n");
        self.text("etc/systemd/system/default.target", DEFAULT_TARGET);
        self.text("etc/systemd/system/egress-tests.service", SERVICE);
        Ok(self)
    }

    /// With the agent's package, and one to be upgraded to it.
    pub fn with_packages(mut self, older: &Path, package: &Path) -> Self {
        for (name, file) in [("older.deb", older), ("egress-agent.deb", package)] {
            self.put(Path::new("packages").join(name), Node::Program(file.to_owned()));
        }
        for directory in ["info", "updates", "triggers"] {
            self.put(Path::new("var/lib/dpkg").join(directory), Node::Directory);
        }
        self.text("var/lib/dpkg/status", "");
        self.text("var/lib/dpkg/available", "");
        self
    }

    /// With the agent, test files and what they run.
    pub fn with_tests(mut self, workspace: &Workspace, tests: &Tests<'_>) -> Result<Self> {
        let deps = workspace.target("debug/deps");
        let mut list = String::new();
        for &name in &tests.files {
            let program = newest(&deps, name)?;
            list.extend([name, " ", &program.to_string_lossy(), "\n"]);
            self.program(&program)?;
        }
        for actor in ACTORS {
            self.program(&workspace.target("debug").join(actor))?;
        }
        self.program(&workspace.agent())?;
        let object = workspace.bpf_object();
        self.put(&object, Node::Program(object.clone()));
        let companions = workspace.target("companions");
        self.tree(&companions.join("dnsmasq"))?;
        self.text("tests", &list);
        let work = workspace.root().join("tests");
        self.put(&work, Node::Directory);
        let variables: [(&str, OsString); 8] = [
            ("EGRESS_AGENT", workspace.agent().into()),
            ("EGRESS_COMPANIONS", companions.into()),
            ("EGRESS_EBPF_OBJECT", object.into()),
            ("EGRESS_FEATURES", "/dev/console".into()),
            // For tests that nobody wants on a machine of his own.
            ("EGRESS_MACHINE", "yes".into()),
            ("OPTIONS", if tests.are_ignored { "--ignored" } else { "" }.into()),
            ("PATIENCE", tests.patience.as_secs().to_string().into()),
            ("WORK", work.into()),
        ];
        let variables = [&variables, tests.variables].concat();
        self.text("environment", &environment(&variables, tests.arguments));
        Ok(self)
    }

    fn put(&mut self, path: impl AsRef<Path>, node: Node) {
        let path = path.as_ref();
        let path = path.strip_prefix("/").unwrap_or(path);
        let is_merged = MERGED.iter().any(|directory| path.starts_with(directory));
        let path = if is_merged { Path::new("usr").join(path) } else { path.to_owned() };
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            self.nodes.entry(parent.to_owned()).or_insert(Node::Directory);
        }
        self.nodes.insert(path, node);
    }

    fn text(&mut self, path: &str, text: &str) {
        self.put(path, Node::Text(text.into(), 0o100_644));
    }

    /// A program of this machine, at its own path, with the libraries that it is linked with.
    fn program(&mut self, program: &Path) -> Result<()> {
        self.put(program, Node::Program(program.to_owned()));
        self.libraries(program, &[])
    }

    fn libraries(&mut self, program: &Path, directories: &[PathBuf]) -> Result<()> {
        let mut ldd = Command::new("ldd");
        ldd.arg(program).env("LD_LIBRARY_PATH", std::env::join_paths(directories)?);
        let printed = process::capture(&mut ldd, &format!("listing the libraries of {}", program.display()))?;
        for library in printed.split_whitespace().filter(|word| word.starts_with('/')) {
            self.put(library, Node::Program(library.into()));
        }
        Ok(())
    }

    /// A companion, with the libraries that its programs take from the system.
    fn tree(&mut self, root: &Path) -> Result<()> {
        let libraries = crate::debian::library_directories(root)?;
        for path in files(root)?.into_iter().map(|path| root.join(path)) {
            if path.parent().is_some_and(|parent| parent.ends_with("sbin")) {
                self.libraries(&path, &libraries)?;
            }
            if path.exists() {
                self.put(&path, Node::Program(path.clone()));
            }
        }
        Ok(())
    }

    fn put_modules(&mut self, workspace: &Workspace, kernel: &Path) -> Result<()> {
        let mut order = String::new();
        for module in MODULES {
            let plain = format!("{module}.ko");
            let Some(file) = find(kernel, |name| name.starts_with(&plain)) else { continue };
            let unpacked = unpacked(workspace, kernel, &file, &plain)?;
            self.put(Path::new("modules").join(&plain), Node::Program(unpacked));
            order.extend([module, "\n"]);
        }
        self.text("modules/order", &order);
        Ok(())
    }

    /// Writes it, in the format that the kernel calls newc.
    pub fn write(&self, path: &Path) -> Result<()> {
        let scratch = path.with_extension("stripped");
        let failed = || format!("cannot write {}", path.display());
        let mut out = BufWriter::new(File::create(path).with_context(failed)?);
        for (number, (name, node)) in (1..).zip(&self.nodes) {
            let (mode, bytes) = match node {
                Node::Directory => (0o040_755, Vec::new()),
                Node::Text(text, mode) => (*mode, text.clone()),
                Node::Link(target) => (0o120_777, target.as_os_str().as_bytes().to_vec()),
                Node::Program(file) => (0o100_000 | mode(file)?, stripped(file, &scratch)?),
            };
            out.write_all(&entry(number, &name.to_string_lossy(), mode, &bytes)).with_context(failed)?;
        }
        out.write_all(&entry(0, "TRAILER!!!", 0, &[])).with_context(failed)?;
        out.flush().with_context(failed)
    }
}

/// Whether the C library that is unpacked at `root` runs a program of this machine.
fn can_run(root: &Path, program: &Path) -> Result<bool> {
    let libraries = crate::debian::library_directories(root)?;
    let loaders = libraries.iter().map(|directory| directory.join("ld-linux-x86-64.so.2"));
    let loader = loaders.into_iter().find(|loader| loader.is_file()).context("the packages have no loader")?;
    let mut command = Command::new(loader);
    command.arg("--library-path").arg(std::env::join_paths(libraries)?).arg(program).arg("--version");
    Ok(command.output().with_context(|| format!("cannot run {}", program.display()))?.status.success())
}

/// Variables and arguments, as the shell reads them.
fn environment(variables: &[(&str, OsString)], arguments: &[OsString]) -> String {
    let quote = |word: &OsStr| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
    let lines = variables.iter().map(|(name, value)| format!("export {name}={}\n", quote(value)));
    let words: Vec<String> = arguments.iter().map(|argument| quote(argument)).collect();
    lines.collect::<String>() + "set -- " + &words.join(" ") + "\n"
}

/// A character device: number 5, 1 (`Documentation/admin-guide/devices.txt`).
const CONSOLE: u32 = 0o020_600;

/// One file of the archive.
fn entry(number: u32, name: &str, mode: u32, bytes: &[u8]) -> Vec<u8> {
    let (major, minor) = if mode == CONSOLE { (5, 1) } else { (0, 0) };
    let sizes = [bytes.len(), name.len() + 1].map(|size| u32::try_from(size).unwrap_or(u32::MAX));
    let fields = [number, mode, 0, 0, 1, 0, sizes[0], 0, 0, major, minor, sizes[1], 0];
    let mut entry: Vec<u8> = b"070701".to_vec();
    entry.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    entry.extend(name.as_bytes());
    entry.push(0);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry.extend(bytes);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry
}

fn mode(file: &Path) -> Result<u32> {
    let metadata = fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(metadata.permissions().mode() & 0o777)
}

/// A file without what only a debugger reads; it is `strip` of the binutils, which every linker here comes with.
fn stripped(file: &Path, scratch: &Path) -> Result<Vec<u8>> {
    const LARGE: usize = 1 << 20;
    // `e_machine` of the kernel programs (`EM_BPF` of `linux/elf-em.h`), which this machine's `strip` does not know.
    const EM_BPF: [u8; 2] = 247_u16.to_le_bytes();
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let bytes = read(file)?;
    let is_for_bpf = bytes.get(18..20) == Some(&EM_BPF);
    if bytes.len() < LARGE || !bytes.starts_with(b"\x7fELF") || is_for_bpf {
        return Ok(bytes);
    }
    let mut strip = Command::new("strip");
    process::run(strip.arg("-o").arg(scratch).arg(file), &format!("stripping {}", file.display()))?;
    let bytes = read(scratch)?;
    fs::remove_file(scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    Ok(bytes)
}

/// A module as `insmod` takes it.
fn unpacked(workspace: &Workspace, kernel: &Path, file: &Path, plain: &str) -> Result<PathBuf> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return Ok(file.to_owned()),
    };
    let name = kernel.file_name().context("a kernel has a name")?;
    let directory = workspace.target("vm").join("modules").join(name);
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let to = directory.join(plain);
    let mut command = Command::new(program);
    let out = File::create(&to).with_context(|| format!("cannot create {}", to.display()))?;
    process::run(command.args(["-dc"]).arg(file).stdout(out), &format!("unpacking {}", file.display()))?;
    Ok(to)
}

/// All files and links of a tree, as paths below it.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut todo) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                todo.push(path);
            } else {
                found.push(path.strip_prefix(root).context("it is below the root")?.to_owned());
            }
        }
    }
    Ok(found)
}

/// A file of a tree by its name.
pub fn find(root: &Path, is_it: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && !path.is_symlink() {
                todo.push(path);
            } else if path.is_file() && path.file_name().is_some_and(|name| is_it(&name.to_string_lossy())) {
                return Some(path);
            }
        }
    }
    None
}

/// The test program that cargo made last of those with a name.
fn newest(deps: &Path, name: &str) -> Result<PathBuf> {
    let is_it = |path: &PathBuf| {
        let stem = path.file_name().and_then(|file| file.to_str()).and_then(|file| file.rsplit_once('-'));
        path.extension().is_none() && stem.is_some_and(|(stem, _)| stem == name)
    };
    let entries = fs::read_dir(deps).with_context(|| format!("cannot read {}", deps.display()))?;
    let programs = entries.flatten().map(|entry| entry.path()).filter(is_it);
    let newest = programs.max_by_key(|path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok());
    newest.with_context(|| format!("no test program {name}: compile the tests"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_padded_to_four_bytes() {
        let entry = entry(7, "init", 0o100_755, b"hello");
        let text = String::from_utf8(entry.clone()).unwrap();
        assert!(text.starts_with("07070100000007000081ed0000000000000000000000010000000000000005"), "{text}");
        assert!(entry.len().is_multiple_of(4) && text.ends_with("hello\0\0\0"), "{text:?}");
        assert!(text.contains("0000000500000000init\0"), "{text:?}");
    }

    #[test]
    fn the_shell_reads_variables_and_arguments_as_they_are() {
        let text = environment(&[("A", "it's $HOME".into())], &["x y".into(), "--exact".into()]);
        let mut shell = Command::new("sh");
        let script = text + "printf '%s|' \"$A\" \"$@\"";
        assert_eq!(process::capture(shell.args(["-c", &script]), "the shell").unwrap(), "it's $HOME|x y|--exact|");
    }

    #[test]
    fn what_lies_in_a_directory_brings_it_along() {
        let mut image = Image { nodes: BTreeMap::new() };
        image.text("etc/a/b", "x");
        let names: Vec<_> = image.nodes.keys().map(|path| path.display().to_string()).collect();
        assert_eq!(names, ["etc", "etc/a", "etc/a/b"]);
    }

    #[test]
    fn libraries_lie_below_usr_whichever_way_they_are_named() {
        let mut image = Image { nodes: BTreeMap::new() };
        image.text("/lib64/a.so", "x");
        image.text("library/b", "x");
        let names: Vec<_> = image.nodes.keys().map(|path| path.display().to_string()).collect();
        assert_eq!(names, ["library", "library/b", "usr", "usr/lib64", "usr/lib64/a.so"]);
    }
}
