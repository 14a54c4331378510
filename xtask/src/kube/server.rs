//! A Kubernetes API server, built from Debian's source package as Debian would build it, with Debian's Go.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{debian::Debian, process, step, workspace::Workspace};

/// Whoever changes what [`build`] leaves changes this.
const RECIPE: &str = "kubernetes 1.20 of bookworm, 1";

const SUITE: &str = "bookworm";

/// The last release that has the sources of the server.
const VERSION: &str = "v1.20.2";

/// What builds it, and what runs beside it. The vendored reflect2 crashes when it was compiled by Go 1.18 or newer; Debian's does not.
const PACKAGES: [&str; 6] = [
    "etcd-server",
    "golang-1.19-go",
    "golang-1.19-src",
    "golang-github-modern-go-concurrent-dev",
    "golang-github-modern-go-reflect2-dev",
    "kubernetes-client",
];

/// The directory of `etcd`, `kube-apiserver` and `kubectl`.
pub fn ensure(workspace: &Workspace) -> Result<PathBuf> {
    let _lock = step::lock(workspace)?;
    let directory = workspace.target("kube");
    step::once(&directory, RECIPE, build).context("cannot build a Kubernetes API server")?;
    Ok(directory.join("bin"))
}

fn build(directory: &Path) -> Result<()> {
    let debian = Debian::suite_with_sources(&directory.join("apt"), &Debian::mirror("debian")?, SUITE)?;
    let unpacked = directory.join("debian");
    debian.unpack(&debian.archives(&PACKAGES)?, &unpacked)?;
    let go =
        Go { root: unpacked.join("usr/lib/go-1.19"), path: directory.join("go"), cache: directory.join("go-cache") };
    let source = go.path.join("src/k8s.io/kubernetes");
    debian.unpack_source("kubernetes", &source)?;
    replace_reflect(&unpacked, &source)?;
    eprintln!("xtask: building kube-apiserver {VERSION}, which takes ten minutes of one core, once");
    generate_openapi(&go, directory, &source)?;
    let programs = directory.join("bin");
    fs::create_dir_all(&programs).with_context(|| format!("cannot create {}", programs.display()))?;
    let version = "-X k8s.io/kubernetes/vendor/k8s.io/component-base/version.git";
    let flags = format!("-s -w {version}Version={VERSION} {version}Major=1 {version}Minor=20");
    go.build("k8s.io/kubernetes/cmd/kube-apiserver", &source, &programs.join("kube-apiserver"), &flags)?;
    for program in ["etcd", "kubectl"] {
        let from = unpacked.join("usr/bin").join(program);
        fs::copy(&from, programs.join(program)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    // Some gigabytes that nobody needs again.
    for made in [&unpacked, &go.path, &go.cache, &directory.join("apt")] {
        fs::remove_dir_all(made).with_context(|| format!("cannot remove {}", made.display()))?;
    }
    Ok(())
}

fn replace_reflect(unpacked: &Path, source: &Path) -> Result<()> {
    for name in ["concurrent", "reflect2"] {
        let name = format!("github.com/modern-go/{name}");
        let vendored = source.join("vendor").join(&name);
        fs::remove_dir_all(&vendored).with_context(|| format!("cannot remove {}", vendored.display()))?;
        let mut copy = Command::new("cp");
        copy.arg("--recursive").arg(unpacked.join("usr/share/gocode/src").join(&name)).arg(&vendored);
        process::run(&mut copy, "copying a package of Go")?;
    }
    Ok(())
}

/// A file that upstream makes while it builds, and that no source package has.
fn generate_openapi(go: &Go, directory: &Path, source: &Path) -> Result<()> {
    const PACKAGE: &str = "k8s.io/kubernetes/pkg/generated/openapi";
    let generator = directory.join("openapi-gen");
    go.build("k8s.io/kubernetes/vendor/k8s.io/kube-openapi/cmd/openapi-gen", source, &generator, "")?;
    let mut grep = Command::new("grep");
    grep.args(["--recursive", "--files-with-matches", "--fixed-strings", "+k8s:openapi-gen=true", "--include=*.go"]);
    let marked =
        process::capture(grep.args(["staging/src", "pkg"]).current_dir(source), "looking for what has a schema")?;
    let (header, violations) = (directory.join("header"), directory.join("violations"));
    fs::write(&header, "").with_context(|| format!("cannot write {}", header.display()))?;
    let mut generate = go.command(&generator, source);
    generate.arg("--go-header-file").arg(&header).args(["--output-file-base", "zz_generated.openapi"]);
    generate.args(["--output-package", PACKAGE, "--input-dirs", &marked_packages(&marked)]);
    generate.arg("--output-base").arg(go.path.join("src")).arg("--report-filename").arg(&violations);
    process::run_to_stderr(&mut generate, "generating the schemas of the API")?;
    [generator, header, violations].iter().try_for_each(|file| Ok(fs::remove_file(file)?))
}

/// The import paths of the directories of files, with commas between.
fn marked_packages(files: &str) -> String {
    let is_meant =
        |file: &&str| !file.contains("zz_generated") && !file.ends_with("_test.go") && !file.contains("/testdata/");
    let import = |file: &str| {
        let directory = file.rsplit_once('/').map_or("", |(directory, _)| directory);
        match directory.strip_prefix("staging/src/") {
            Some(staged) => format!("k8s.io/kubernetes/vendor/{staged}"),
            None => format!("k8s.io/kubernetes/{directory}"),
        }
    };
    let mut packages: Vec<String> = files.lines().filter(is_meant).map(import).collect();
    packages.sort();
    packages.dedup();
    packages.join(",")
}

/// Go with all it keeps in one place, and no modules: the sources have what they need.
struct Go {
    root: PathBuf,
    path: PathBuf,
    cache: PathBuf,
}

impl Go {
    fn command(&self, program: &Path, source: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(source).env("GOROOT", &self.root).env("GOPATH", &self.path).env("GOCACHE", &self.cache);
        command.envs([("GO111MODULE", "off"), ("GOENV", "off"), ("GOFLAGS", ""), ("CGO_ENABLED", "0")]);
        command
    }

    fn build(&self, package: &str, source: &Path, program: &Path, flags: &str) -> Result<()> {
        let mut build = self.command(&self.root.join("bin/go"), source);
        build.arg("build").arg("-o").arg(program).args(["-ldflags", flags, package]);
        process::run_to_stderr(&mut build, &format!("building {package}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_staged_is_imported_as_vendored() {
        let files = "staging/src/k8s.io/api/core/v1/doc.go\npkg/apis/x/doc.go\npkg/apis/x/more.go\n\
                     pkg/apis/y/zz_generated.openapi.go\nstaging/src/k8s.io/z/testdata/a/doc.go\npkg/apis/w/a_test.go\n";
        assert_eq!(marked_packages(files), "k8s.io/kubernetes/pkg/apis/x,k8s.io/kubernetes/vendor/k8s.io/api/core/v1");
    }
}
