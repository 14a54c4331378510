//! A real Kubernetes API server with its etcd, in a network namespace of its own, and its real client.
//!
//! `cargo xtask kube` builds them. Nothing else of Kubernetes runs: no scheduler, no kubelet, no controllers. What those would do
//! is done here: pods are given a node and a status.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{eventually, netns::Netns};

/// Who asks, by a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User(&'static str);

/// May do everything.
pub const ADMIN: User = User("admin");
/// The agent, by the account that the chart makes for it: it may do what the chart allows.
pub const AGENT: User = User("agent");
/// Somebody who may do what a test allows.
pub const TENANT: User = User("tenant");

/// As `--token-auth-file` has it: token, name, id, groups.
const TOKENS: &str = "\
admin,admin,1,system:masters
agent,system:serviceaccount:egress-system:egress-agent,2,system:serviceaccounts
tenant,tenant,3,
";

const API: &str = "https://127.0.0.1:6443";
const ETCD: &str = "127.0.0.1:2379";

/// A running server. Both programs end when it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    api: Option<Child>,
    etcd: Child,
    /// The network that it is reached in, where every address is local.
    pub network: Netns,
    directory: TempDir,
}

impl ApiServer {
    /// Starts one that has nothing.
    pub fn start() -> Result<Self> {
        let (directory, network) =
            (tempfile::Builder::new().prefix("egress-kube-").tempdir()?, Netns::with_every_address_local()?);
        write_certificates(directory.path())?;
        fs::write(directory.path().join("tokens"), TOKENS)?;
        for User(token) in [ADMIN, AGENT, TENANT] {
            fs::write(directory.path().join(token), kubeconfig(directory.path(), token).to_string())?;
        }
        let mut etcd = network.command(program("etcd")?, None)?;
        etcd.arg("--data-dir").arg(directory.path().join("etcd"));
        for option in ["listen-client-urls", "advertise-client-urls"] {
            etcd.arg(format!("--{option}=http://{ETCD}"));
        }
        let etcd = spawn(etcd, &directory.path().join("etcd.log"))?;
        let mut server = Self { api: None, etcd, network, directory };
        server.restart()?;
        Ok(server)
    }

    /// Makes the definitions of both kinds of policies, and waits until they can be written.
    pub fn define(&self) -> Result<()> {
        self.apply(ADMIN, &service_entry_definition())?;
        self.must(ADMIN, &["apply", "--filename", concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds")])?;
        self.must(ADMIN, &["wait", "--for=condition=Established", "crd", "--all"]).map(drop)
    }

    /// Makes what the chart makes, the account of the agent and its role among it.
    pub fn install(&self) -> Result<()> {
        self.must(ADMIN, &["apply", "--filename", concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes")])
            .map(drop)
    }

    /// Starts it again, and waits until it answers; etcd kept what there was.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        let mut command = self.network.command(program("kube-apiserver")?, None)?;
        command.args(["--bind-address=127.0.0.1", "--secure-port=6443", "--service-cluster-ip-range=10.96.0.0/16"]);
        command.args(["--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount"]);
        // What is asked of it here is more than one client would.
        command.args([
            "--max-requests-inflight=0",
            "--max-mutating-requests-inflight=0",
            "--enable-priority-and-fairness=false",
        ]);
        // It must have one that is no loopback's, and looks for none where there is no default route.
        command.arg("--advertise-address=192.0.2.1");
        command
            .arg(format!("--etcd-servers=http://{ETCD}"))
            .arg("--service-account-issuer=https://kubernetes.default.svc");
        for (option, file) in [
            ("cert-dir", "certificates"),
            ("tls-cert-file", "server.pem"),
            ("tls-private-key-file", "server.key"),
            ("token-auth-file", "tokens"),
            ("service-account-key-file", "accounts.pub"),
            ("service-account-signing-key-file", "accounts.key"),
        ] {
            command.arg(format!("--{option}={}", path(file)));
        }
        let log = self.directory.path().join("api.log");
        let mut api = spawn(command, &log)?;
        let is_ready = || self.kubectl(ADMIN, &["get", "--raw", "/readyz"]).is_ok_and(|output| output.status.success());
        let ended = eventually("the API server", || match api.try_wait() {
            Ok(None) => is_ready().then_some(false),
            Ok(Some(_)) | Err(_) => Some(true),
        });
        self.api = Some(api);
        ensure!(!ended?, "the API server has ended: {}", fs::read_to_string(log)?);
        Ok(())
    }

    /// Ends it at once, with every connection, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut api) = self.api.take() {
            end(&mut api);
        }
    }

    /// Has etcd forget everything but the newest state.
    pub fn compact(&self) -> Result<()> {
        let found = self.etcd("/v3/kv/range", &json!({ "key": "AA==" }))?;
        let revision = found["header"]["revision"].as_str().context("etcd tells no revision")?.to_owned();
        self.etcd("/v3/kv/compaction", &json!({ "revision": revision, "physical": true })).map(drop)
    }

    fn etcd(&self, path: &str, body: &Value) -> Result<Value> {
        self.network.run(|| {
            let body = body.to_string();
            let mut stream = TcpStream::connect(ETCD)?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            write!(stream, "POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("etcd answers by HTTP")?;
            ensure!(head.contains(" 200 "), "etcd says {answer}");
            Ok(serde_json::from_str(body)?)
        })?
    }

    /// The file that tells a client where it is and who asks.
    pub fn kubeconfig(&self, user: User) -> PathBuf {
        self.directory.path().join(user.0)
    }

    /// What `kubectl` says to somebody.
    pub fn kubectl(&self, user: User, args: &[&str]) -> Result<Output> {
        Ok(self.client(user, args)?.stdin(Stdio::null()).output()?)
    }

    fn client(&self, user: User, args: &[&str]) -> Result<Command> {
        let mut command = self.network.command(program("kubectl")?, None)?;
        command.args(args).env("KUBECONFIG", self.kubeconfig(user)).env("HOME", self.directory.path());
        Ok(command)
    }

    /// Has it do something that must succeed; what it prints.
    pub fn must(&self, user: User, args: &[&str]) -> Result<String> {
        printed(&self.kubectl(user, args)?, args)
    }

    /// Has it do something to an object, which it reads from its standard input.
    pub fn with(&self, user: User, args: &[&str], object: &Value) -> Result<Output> {
        let mut command = self.client(user, args)?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("a pipe was asked for")?.write_all(object.to_string().as_bytes())?;
        Ok(child.wait_with_output()?)
    }

    /// Applies an object that must be accepted; as it is then.
    pub fn apply(&self, user: User, object: &Value) -> Result<Value> {
        const APPLY: [&str; 5] = ["apply", "--output", "json", "--filename", "-"];
        Ok(serde_json::from_str(&printed(&self.with(user, &APPLY, object)?, &APPLY)?)?)
    }

    /// Sets the status of an object, which no client but controllers does.
    pub fn set_status(&self, path: &str, object: &Value) -> Result<()> {
        let path = format!("{path}/status");
        let args = ["replace", "--raw", &path, "--filename", "-"];
        printed(&self.with(ADMIN, &args, object)?, &args).map(drop)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.kill();
        end(&mut self.etcd);
    }
}

fn printed(output: &Output, args: &[&str]) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "kubectl {}: {}", args.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Neither has anything to lose: the directory goes as well.
fn end(child: &mut Child) {
    // Fails only if it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    let program = command.get_program().display().to_string();
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {program}"))
}

fn program(name: &str) -> Result<PathBuf> {
    let directory = std::env::var_os("EGRESS_KUBE").context("EGRESS_KUBE is not set: run `cargo xtask kube`")?;
    Ok(Path::new(&directory).join(name))
}

fn kubeconfig(directory: &Path, token: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": { "server": API, "certificate-authority": directory.join("ca.pem") } }],
        "users": [{ "name": "test", "user": { "token": token } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
    })
}

/// An authority, a server's certificate of it, and the keys by which accounts of services are signed.
fn write_certificates(directory: &Path) -> Result<()> {
    let (authority_key, server_key, accounts) = (KeyPair::generate()?, KeyPair::generate()?, KeyPair::generate()?);
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = authority.self_signed(&authority_key)?;
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    let server = server.signed_by(&server_key, &Issuer::new(authority, authority_key))?;
    for (name, text) in [
        ("ca.pem", certificate.pem()),
        ("server.pem", server.pem()),
        ("server.key", server_key.serialize_pem()),
        ("accounts.key", accounts.serialize_pem()),
        ("accounts.pub", accounts.public_key_pem()),
    ] {
        fs::write(directory.join(name), text)?;
    }
    Ok(())
}

/// Istio's definition of `ServiceEntry`, without its schema: what the agent takes and refuses is its own matter.
fn service_entry_definition() -> Value {
    let version = |name: &str, storage: bool| {
        json!({
            "name": name, "served": true, "storage": storage,
            "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": "serviceentries.networking.istio.io" },
        "spec": {
            "group": "networking.istio.io", "scope": "Namespaced",
            "names": { "kind": "ServiceEntry", "listKind": "ServiceEntryList", "plural": "serviceentries", "singular": "serviceentry", "shortNames": ["se"] },
            "versions": [version("v1", true), version("v1beta1", false), version("v1alpha3", false)],
        },
    })
}
