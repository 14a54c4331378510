//! `egress-agent check`: every error and every lint of a set of documents, for a person or for a program.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _, Write},
    net::ToSocketAddrs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;

use crate::{
    cli::Output,
    compile::combine::is_dialled_by_name,
    policy::{
        EndpointAddress, HostPattern, PolicySet, ServiceEntry,
        code::Code,
        diagnostic::{Color, Finding, Severity, render},
        lint::lint,
        load::{LoadError, LoadOptions, Loaded, MAX_FILE, load},
        yaml::Span,
    },
    text,
};

/// What was found: fields are only ever added to the shape.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Files that were read.
    pub files: usize,
    /// Documents in them.
    pub documents: usize,
    /// By file and position.
    pub findings: Vec<Finding>,
    #[serde(skip)]
    sources: HashMap<Arc<Path>, Arc<str>>,
}

/// Whether names may be looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookUp {
    /// Nothing leaves the machine.
    Never,
    /// The system's resolver is asked for the names of entries that have nothing else.
    System,
}

impl Report {
    /// Reads documents and finds all there is to say about them. Lints need valid documents, so they come only where no
    /// document is wrong.
    pub fn new(paths: &[PathBuf], look_up: LookUp) -> Result<Self, LoadError> {
        let loaded = load(paths, &LoadOptions::default())?;
        let lints = if loaded.has_errors() { Vec::new() } else { lints(&loaded.policies, look_up) };
        let Loaded { mut findings, files, documents, sources, .. } = loaded;
        findings.extend(lints);
        findings.sort_by(|a, b| (&a.file, a.line, a.column, a.code).cmp(&(&b.file, b.line, b.column, b.code)));
        Ok(Self { files, documents, findings, sources })
    }

    /// How many findings are this severe.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    /// 0 if nothing is wrong, else 1; with `strict`, every finding is wrong.
    pub fn exit_code(&self, strict: bool) -> u8 {
        let wrong = if strict { self.findings.len() } else { self.count(Severity::Error) };
        u8::from(wrong > 0)
    }

    /// Writes the report.
    pub fn write(&self, out: &mut impl Write, output: Output, color: Color) -> io::Result<()> {
        match output {
            Output::Json => {
                text::to_json(&mut *out, self)?;
                writeln!(out)
            }
            Output::Text => {
                for of_file in self.findings.chunk_by(|a, b| a.file == b.file) {
                    let source = self.source(&of_file[0].file);
                    for finding in of_file {
                        writeln!(out, "{}", render(finding, source.as_deref(), color))?;
                    }
                }
                writeln!(out, "{}", self.summary())
            }
        }
    }

    /// The text of a file that has findings.
    fn source(&self, file: &Path) -> Option<Arc<str>> {
        self.sources.get(file).cloned().or_else(|| read_again(file))
    }

    fn summary(&self) -> String {
        let number = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        format!(
            "{} in {}: {}, {}, {}",
            number(self.documents, "document"),
            number(self.files, "file"),
            number(self.count(Severity::Error), "error"),
            number(self.count(Severity::Warning), "warning"),
            number(self.count(Severity::Note), "note"),
        )
    }
}

/// The text of a file whose findings came after it was read. Only regular files are the same the second time: a pipe may
/// never have a writer again, and a device need not end.
fn read_again(file: &Path) -> Option<Arc<str>> {
    if !fs::metadata(file).ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(file).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text.into())
}

/// What is valid and probably not meant.
fn lints(policies: &PolicySet, look_up: LookUp) -> Vec<Finding> {
    let mut findings = lint(policies);
    if look_up == LookUp::System {
        findings.retain(|finding| finding.code != Code::NeedsLookup);
        findings.extend(policies.service_entries.iter().filter(|entry| !resolves(entry)).map(does_not_resolve));
    }
    findings
}

/// Whether an entry that is dialled by its names has one that resolves now.
fn resolves(entry: &ServiceEntry) -> bool {
    let endpoints = entry.endpoints.iter().filter_map(|endpoint| match &endpoint.address {
        EndpointAddress::Host(name) => Some(name),
        EndpointAddress::Ip(_) | EndpointAddress::Unix(_) | EndpointAddress::Gateway => None,
    });
    let hosts = entry.hosts.iter().filter_map(|host| match host {
        HostPattern::Exact(name) => Some(name),
        HostPattern::Below(_) | HostPattern::Ending(_) => None,
    });
    let mut names = hosts.chain(endpoints).peekable();
    !is_dialled_by_name(entry) || names.peek().is_none() || names.any(|name| is_there(name))
}

fn is_there(name: &str) -> bool {
    (name, 0).to_socket_addrs().is_ok_and(|mut found| found.next().is_some())
}

fn does_not_resolve(entry: &ServiceEntry) -> Finding {
    let span = Span { line: entry.at.line, column: entry.at.column, length: 1 };
    let hosts: Vec<String> = entry.hosts.iter().map(ToString::to_string).collect();
    Finding::at(Code::DoesNotResolve, &entry.at.file, span, format!("no address is known of {}", hosts.join(", ")))
        .with_path("spec.hosts")
        .with_help("check the names, or list `addresses`")
}
