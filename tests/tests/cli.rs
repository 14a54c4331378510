//! `check` and `explain`: shapes, exit statuses, and what a person reads.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use egress_tests::agent::binary;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What a command left.
struct Done {
    status: i32,
    out: String,
    err: String,
}

impl Done {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}\n{}", self.out, self.err))
    }

    fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn agent(args: &[&str], input: &str) -> Done {
    let mut command = Command::new(binary().unwrap());
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that does not read its input may have ended already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Done { status: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

fn policies(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

fn path(directory: &TempDir) -> &str {
    directory.path().to_str().unwrap()
}

const ENTRY: &str = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: mysql, namespace: shop }
spec:
  hosts: [mysql.example.com]
  addresses: [203.0.113.10/32]
  ports: [{ number: 3306, name: tcp, protocol: TCP }, { number: 53, name: dns, protocol: UDP }]
";

const POLICY: &str = "apiVersion: egress.filter/v1alpha1
kind: EgressPolicy
metadata: { name: web, namespace: shop }
spec:
  workloads: [{ unit: nginx.service }]
  services: [./mysql]
  allow:
    - to: [{ cidr: 10.0.0.0/8, except: [10.1.0.0/16] }]
      ports: [{ port: 443 }]
  deny:
    - to: [{ cidr: 10.9.9.9/32 }]
";

fn example(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies").join(name).to_str().unwrap().to_owned()
}

#[test]
fn check_reports_counts_and_findings_in_the_agreed_shape() {
    let directory = policies(&[("a.yaml", ENTRY), ("b.yaml", &ENTRY.replace("mysql", "b").replace("3306", "0"))]);
    let done = agent(&["check", path(&directory)], "");
    assert_eq!(done.status, 1, "{}", done.err);
    let report = done.json();
    assert_eq!((&report["files"], &report["documents"]), (&json!(2), &json!(2)));
    let error = report["findings"].as_array().unwrap().iter().find(|finding| finding["severity"] == "error").unwrap();
    assert!(error["code"].as_str().unwrap().starts_with("E01"), "{error}");
    assert!(error["file"].as_str().unwrap().ends_with("b.yaml"));
    assert_eq!((&error["line"], &error["path"]), (&json!(7), &json!("spec.ports[0].number")));
    assert!(error["column"].as_u64().unwrap() > 1 && error["message"].is_string() && error["help"].is_string());
}

#[test]
fn check_underlines_for_a_person() {
    let directory = policies(&[("a.yaml", &ENTRY.replace("3306", "70000"))]);
    let done = agent(&["check", "--output", "text", path(&directory)], "");
    assert_eq!(done.status, 1);
    for part in ["error[E01", "a.yaml:7:21", "number: 70000", "^^^^^ spec.ports[0].number", "help:", "1 error"] {
        assert!(done.out.contains(part), "{part} in\n{}", done.out);
    }
    assert!(!done.out.contains('\u{1b}'), "colors are for terminals");
}

#[test]
fn strict_makes_every_finding_count() {
    let warned = policies(&[("a.yaml", &ENTRY.replace("203.0.113.10/32", "0.0.0.0/0"))]);
    assert_eq!(agent(&["check", path(&warned)], "").status, 0);
    assert_eq!(agent(&["check", "--strict", path(&warned)], "").status, 1);
    let clean = policies(&[("a.yaml", ENTRY)]);
    assert_eq!(agent(&["check", "--strict", path(&clean)], "").status, 0);
}

#[test]
fn names_are_looked_up_only_when_asked_for() {
    let entry = |host: &str| {
        ENTRY.replace("  addresses: [203.0.113.10/32]\n", "  resolution: DNS\n").replace("mysql.example.com", host)
    };
    let codes = |host: &str, more: &[&str]| {
        let directory = policies(&[("a.yaml", &entry(host))]);
        let report = agent(&[&["check", path(&directory)], more].concat(), "").json();
        let findings = report["findings"].as_array().unwrap().clone();
        findings.iter().map(|finding| finding["code"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(codes("localhost.localdomain", &[]), ["N0104"]);
    // `localhost` is answered by every system without a question to anybody; `invalid` never has an address (RFC 6761).
    assert_eq!(codes("localhost", &["--resolve"]), Vec::<String>::new());
    assert_eq!(codes("nothing.invalid", &["--resolve"]), ["W0112"]);
}

#[test]
fn what_cannot_run_ends_with_2() {
    assert_eq!(agent(&["check", "/nonexistent"], "").status, 2);
    assert_eq!(agent(&["explain", "/nonexistent", "--to", "10.0.0.1:1"], "").status, 2);
    let directory = policies(&[("a.yaml", ENTRY)]);
    for to in ["10.0.0.1", "10.0.0.1:x", "10.0.0.1:70000", ":1", "a b:1", "010.0.0.1:80", "0x7f.1:80", "localhost:+80"]
    {
        let done = agent(&["explain", path(&directory), "--to", to], "");
        assert_eq!(done.status, 2, "{to}");
        assert!(done.err.contains("HOST:PORT"), "{}", done.err);
    }
    let invalid = policies(&[("a.yaml", &ENTRY.replace("3306", "0"))]);
    let done = agent(&["explain", path(&invalid), "--to", "10.0.0.1:1"], "");
    assert_eq!(done.status, 2);
    assert!(done.err.contains("spec.ports[0].number"), "{}", done.err);
}

#[test]
fn explain_names_the_rule_and_the_others_in_the_agreed_shape() {
    let directory = policies(&[("a.yaml", ENTRY), ("b.yaml", POLICY)]);
    let explain = |to: &str| {
        let done = agent(&["explain", path(&directory), "--to", to, "--cgroup", "system.slice/nginx.service"], "");
        (done.status, done.json())
    };
    let (status, answer) = explain("203.0.113.10:3306");
    assert_eq!((status, &answer["verdict"], &answer["reason"]), (0, &json!("allow"), &json!("rule")));
    let rule = &answer["rule"];
    assert_eq!(
        (&rule["kind"], &rule["namespace"], &rule["name"]),
        (&json!("ServiceEntry"), &json!("shop"), &json!("mysql"))
    );
    assert_eq!((&rule["path"], &rule["line"]), (&json!("ports[0]"), &json!(7)));
    assert!(rule["file"].as_str().unwrap().ends_with("a.yaml"));
    assert_eq!(answer["to"], json!({ "address": "203.0.113.10", "port": 3306, "protocol": "TCP" }));
    assert_eq!(answer["policies"], json!(["EgressPolicy/shop/web"]));

    let (status, answer) = explain("203.0.113.10:53");
    assert_eq!((status, &answer["verdict"], &answer["reason"]), (1, &json!("deny"), &json!("no_rule")));
    assert_eq!(answer["rule"], Value::Null);
    let why = |answer: &Value, path: &str| {
        let others = answer["other_rules"].as_array().unwrap();
        let found = others.iter().find(|other| other["rule"]["path"] == path);
        found.map(|other| (other["why_not"].as_str().unwrap().to_owned(), other["effect"].as_str().unwrap().to_owned()))
    };
    let said = |why_not: &str, effect: &str| Some((why_not.to_owned(), effect.to_owned()));
    assert_eq!(why(&answer, "ports[0]"), said("port", "allow"));
    assert_eq!(why(&answer, "ports[1]"), said("protocol", "allow"));

    let (_, answer) = explain("10.9.9.9:443");
    assert_eq!((&answer["verdict"], &answer["rule"]["path"]), (&json!("deny"), &json!("deny[0]")));
    assert_eq!(why(&answer, "allow[0]"), said("lower_precedence", "allow"));
    assert!(answer.get("to_allow").is_none(), "no document opens what a deny refuses");
    let (_, answer) = explain("10.1.2.3:443");
    assert_eq!((&answer["verdict"], &answer["reason"]), (&json!("deny"), &json!("no_rule")));
}

#[test]
fn explain_says_what_is_not_imported_and_what_only_audits() {
    let audit = POLICY.replace("spec:\n", "spec:\n  mode: Audit\n").replace("[./mysql]", "[]");
    let directory = policies(&[("a.yaml", ENTRY), ("b.yaml", &audit)]);
    let args = |to| ["explain", path(&directory), "--to", to, "--unit", "nginx.service", "--default", "Allow"];
    let answer = agent(&args("203.0.113.10:3306"), "").json();
    assert_eq!((&answer["verdict"], &answer["reason"]), (&json!("would_deny"), &json!("no_rule")));
    assert_eq!(answer["other_rules"][0]["why_not"], "not_imported");
    let done = agent(&args("10.2.0.1:443"), "");
    assert_eq!((done.status, &done.json()["verdict"]), (0, &json!("allow")));
    assert_eq!(done.json()["other_rules"][0]["why_not"], "audit");
}

#[test]
fn the_networks_and_resolvers_of_a_cluster_are_for_its_pods_alone() {
    let directory = policies(&[("a.yaml", ENTRY)]);
    let cluster =
        ["--internal-cidrs", "10.0.0.0/8,fd00::/8", "--cluster-dns", "192.0.2.53", "--system-resolver", "127.0.0.53"];
    let status = |to: &str, more: &[&str]| {
        agent(&[&["explain", path(&directory), "--to", to], &cluster[..], more].concat(), "").status
    };
    for inside in ["10.1.2.3:8080", "[fd00::1]:8080", "192.0.2.53:53"] {
        assert_eq!(status(inside, &["--namespace", "shop"]), 0, "{inside}");
        assert_eq!(status(inside, &["--unit", "nginx.service"]), 1, "{inside}");
    }
    assert_eq!(status("192.0.2.80:80", &["--namespace", "shop"]), 1);
}

#[test]
fn a_name_is_explained_by_the_addresses_that_are_given_for_it() {
    let by_name = ENTRY.replace("  addresses: [203.0.113.10/32]\n", "  resolution: DNS\n");
    let directory = policies(&[("a.yaml", &by_name)]);
    let args = ["explain", path(&directory), "--to", "MySQL.example.com.:3306", "--resolve"];
    let done = agent(&[&args[..], &["mysql.example.com=192.0.2.7"]].concat(), "");
    let answer = done.json();
    assert_eq!((done.status, &answer["to"]["address"]), (0, &json!("192.0.2.7")), "{answer}");
    assert_eq!(answer["to"]["host"], "mysql.example.com");
    // Without the name, its address is one like any other.
    assert_eq!(agent(&["explain", path(&directory), "--to", "192.0.2.7:3306"], "").status, 1);
}

/// An address may be open and its name closed, and the other way round.
#[test]
fn explain_says_whether_a_name_may_be_asked_for() {
    let policy = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: p }\nspec:\n  \
                  allow: [ { to: [ { host: '*.example.org' }, { cidr: 192.0.2.0/24 } ], ports: [ { port: 443 } ] } ]\n  dns: { queries: Named }\n";
    let directory = policies(&[("a.yaml", ENTRY), ("b.yaml", policy)]);
    let ask = |to: &str, more: &[&str]| {
        let host = to.split(':').next().unwrap();
        let resolve = format!("{host}=192.0.2.7");
        agent(&[&["explain", path(&directory), "--to", to, "--resolve", &resolve], more].concat(), "")
    };
    for (host, query) in [
        ("a.example.org", "allow"),
        // Its addresses are written down in an entry.
        ("mysql.example.com", "allow"),
        ("example.org", "deny"),
        ("evil.net", "deny"),
    ] {
        let done = ask(&format!("{host}:443"), &[]);
        assert_eq!((done.status, &done.json()["query"]), (0, &json!(query)), "{host}");
    }
    let text = ask("evil.net:443", &["--output", "text"]).out;
    assert!(text.contains("its name may not be asked for (`dns.queries: Named`)"), "{text}");
    // What it proposes lets it be asked for.
    let proposed = ask("evil.net:443", &[]).json()["to_allow"].as_str().unwrap().to_owned();
    fs::write(directory.path().join("c.yaml"), proposed).unwrap();
    let after = ask("evil.net:443", &[]).json();
    assert_eq!((&after["query"], &after["to_allow"]), (&json!("allow"), &json!(null)));
    fs::remove_file(directory.path().join("c.yaml")).unwrap();
    let audited = policy.replace("spec:\n", "spec:\n  mode: Audit\n");
    fs::write(directory.path().join("b.yaml"), audited).unwrap();
    assert_eq!(ask("evil.net:443", &[]).json()["query"], "would_deny");
    fs::write(directory.path().join("b.yaml"), policy.replace("  dns: { queries: Named }\n", "")).unwrap();
    assert_eq!(ask("evil.net:443", &[]).json().get("query"), None);
}

#[test]
fn what_explain_proposes_is_accepted_and_opens_the_destination() {
    for (files, more) in [(&[("a.yaml", ENTRY)][..], &[][..]), (&[("b.yaml", POLICY)], &["--unit", "nginx.service"])] {
        let directory = policies(files);
        let args = [&["explain", path(&directory), "--to", "[2001:db8::5]:443"], more].concat();
        let before = agent(&args, "");
        assert_eq!(before.status, 1);
        let document = before.json()["to_allow"].as_str().unwrap().to_owned();
        fs::write(directory.path().join("more.yaml"), &document).unwrap();
        assert_eq!(agent(&args, "").status, 0, "{document}");
    }
}

#[test]
fn flows_are_answered_in_their_order() {
    let directory = policies(&[("a.yaml", ENTRY), ("b.yaml", POLICY)]);
    let flows = [
        json!({ "to": "203.0.113.10:3306" }),
        json!({ "to": "203.0.113.10:3306", "unit": "nginx.service" }),
        json!({ "to": "203.0.113.10:53", "protocol": "udp", "unit": "nginx.service" }),
        json!({ "to": "203.0.113.10:53", "unit": "nginx.service" }),
        json!({ "to": "10.2.0.1:443", "cgroup": "/system.slice/nginx.service/x" }),
        json!({ "to": "10.2.0.1:443", "namespace": "shop", "user": "root" }),
    ];
    let input: String = flows.iter().map(|flow| flow.to_string() + "\n").collect();
    let done = agent(&["explain", path(&directory), "--flows", "-"], &input);
    assert_eq!(done.status, 0, "{}", done.err);
    let verdicts: Vec<Value> = done.lines().iter().map(|answer| answer["verdict"].clone()).collect();
    // The entry is exported to all; without a selecting policy the node default uses it.
    assert_eq!(verdicts, ["allow", "allow", "allow", "deny", "allow", "deny"]);

    let done = agent(&["explain", path(&directory), "--flows", "-"], &format!("nonsense\n{}\n", flows[0]));
    assert_eq!(done.status, 2);
    assert_eq!((&done.lines()[0]["line"], &done.lines()[1]["verdict"]), (&json!(1), &json!("allow")));
}

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    let directory = policies(&[("a.yaml", ENTRY)]);
    let script =
        "\"$0\" explain \"$1\" --flows - 2>&1 >/dev/full | grep -c 'No space'; exec \"$0\" check \"$1\" | true";
    let done = Command::new("sh").args(["-c", script]).arg(binary().unwrap()).arg(directory.path()).output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The status of a command whose output nobody reads: `head` takes one byte and leaves; later writes fail.
fn status_without_reader(args: &[&str]) -> i32 {
    let script = "{ \"$@\"; echo $? >&3; } 3>&2 2>/dev/null | head -c 1 >/dev/null";
    let command = Command::new("sh").args(["-c", script, "sh"]).arg(binary().unwrap()).args(args).output().unwrap();
    String::from_utf8(command.stderr).unwrap().trim().parse().unwrap()
}

#[test]
fn a_reader_that_leaves_early_changes_no_exit_status() {
    let bad: String =
        (0..2000).map(|n| ENTRY.replace("3306", "0").replace("mysql", &format!("e{n}")) + "---\n").collect();
    let bad = policies(&[("bad.yaml", &bad)]);
    for output in ["text", "json"] {
        assert_eq!(status_without_reader(&["check", "--output", output, path(&bad)]), 1, "{output}");
    }
    // More than a pipe holds, so that something is still to be written when the reader is gone.
    let good: String = (0..2000).map(|n| ENTRY.replace("mysql", &format!("e{n}")) + "---\n").collect();
    let good = policies(&[("good.yaml", &good)]);
    for output in ["text", "json"] {
        let args = ["explain", path(&good), "--to", "203.0.113.10:9", "--output", output];
        assert_eq!(status_without_reader(&args), 1, "{output}");
    }
}

/// What has no end, or no writer, is read once at most.
#[test]
fn what_is_not_a_file_blocks_no_report() {
    let directory = policies(&[("a.yaml", ENTRY)]);
    let made = Command::new("mkfifo").arg(directory.path().join("f.yaml")).status().unwrap();
    assert!(made.success());
    std::os::unix::fs::symlink("/dev/zero", directory.path().join("z.yaml")).unwrap();
    let mut command = Command::new("timeout");
    command.arg("20").arg(binary().unwrap()).args(["check", "--output", "text", path(&directory)]);
    let done = command.output().unwrap();
    let out = String::from_utf8(done.stdout).unwrap();
    assert_eq!(done.status.code(), Some(1), "{out}");
    assert!(out.contains("f.yaml") && out.contains("z.yaml"), "{out}");
}

#[test]
fn many_rules_for_one_address_are_explained_in_time() {
    let entries: String = (0..20_000).map(|n| ENTRY.replace("mysql", &format!("e{n}")) + "---\n").collect();
    let directory = policies(&[("a.yaml", &entries)]);
    let mut command = Command::new("timeout");
    command.arg("20").arg(binary().unwrap()).args(["explain", path(&directory), "--to", "203.0.113.10:3306"]);
    let answer: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
    let others = answer["other_rules"].as_array().unwrap();
    assert_eq!(others.iter().filter(|other| other["why_not"] == "lower_precedence").count(), 19_999);
}

#[test]
fn proto_is_that_of_the_flows_that_name_none() {
    let directory = policies(&[("a.yaml", ENTRY)]);
    let input = "{\"to\":\"203.0.113.10:53\"}\n{\"to\":\"203.0.113.10:53\",\"protocol\":\"TCP\"}\n";
    let done = agent(&["explain", path(&directory), "--flows", "-", "--proto", "udp"], input);
    let verdicts: Vec<Value> = done.lines().iter().map(|answer| answer["verdict"].clone()).collect();
    assert_eq!(verdicts, ["allow", "deny"]);
}

/// A destination and the verdict that an example gives.
type Case<'a> = (&'a str, &'a str, &'a [&'a str]);

/// Every example of `policies/` with what it opens and what it keeps closed.
#[test]
fn every_example_does_what_its_comment_says() {
    let web: &[&str] = &["--unit", "nginx.service"];
    let ci: &[&str] = &["--user", "ci", "--system-resolver", "10.30.0.53"];
    let examples: &[(&str, &[Case<'_>])] = &[
        ("mysql-external.yaml", &[("203.0.113.10:3306", "allow", &[]), ("203.0.113.10:3307", "deny", &[])]),
        (
            "mongodb-external.yaml",
            &[
                ("198.51.100.12:27017", "allow", &[]),
                ("[2001:db8:77::13]:27017", "allow", &[]),
                ("198.51.100.13:27017", "deny", &[]),
            ],
        ),
        (
            "https-by-name.yaml",
            &[
                ("api.example.com:443", "allow", &["--resolve", "api.example.com=192.0.2.9"]),
                ("api.example.com:80", "deny", &["--resolve", "api.example.com=192.0.2.9"]),
                ("www.example.com:443", "deny", &["--resolve", "www.example.com=192.0.2.10"]),
            ],
        ),
        (
            "cidr-ranges.yaml",
            &[
                ("192.0.2.1:636", "allow", &[]),
                ("192.0.2.1:88", "deny", &[]),
                ("192.0.2.70:636", "allow", &[]),
                ("192.0.2.70:88", "allow", &[]),
                ("192.0.2.70:464", "allow", &["--proto", "udp"]),
                ("[2001:db8:ab::9]:636", "allow", &[]),
            ],
        ),
        (
            "hardened-web-server.yaml",
            &[
                ("10.20.1.1:8050", "allow", web),
                ("10.20.1.1:8100", "deny", web),
                ("10.20.255.1:8050", "deny", web),
                ("169.254.169.254:80", "deny", web),
                ("10.20.0.53:53", "allow", web),
                ("127.0.0.1:9000", "allow", web),
            ],
        ),
        (
            "audit-first.yaml",
            &[
                ("10.1.1.1:443", "allow", &["--default", "Allow"]),
                ("192.0.2.1:443", "would_deny", &["--default", "Allow"]),
            ],
        ),
        (
            "ci-job.yaml",
            &[
                ("10.30.0.10:443", "allow", ci),
                ("10.30.0.10:22", "deny", ci),
                ("10.30.0.12:443", "deny", ci),
                ("10.30.0.53:53", "allow", ci),
            ],
        ),
    ];
    for (file, cases) in examples {
        for (to, verdict, more) in *cases {
            let done = agent(&[&["explain", &example(file), "--to", to], *more].concat(), "");
            assert_eq!(done.json()["verdict"], *verdict, "{file} {to}");
        }
        let done = agent(&["check", &example(file)], "");
        assert_eq!(done.status, 0, "{file}: {}", done.out);
    }
    let there = fs::read_dir(example("")).unwrap().count();
    assert_eq!(there, examples.len(), "an example is not explained here");
}
