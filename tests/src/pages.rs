//! Files that are generated: schemas, the CRD and reference pages. Each is made of what the agent itself uses, so that
//! it cannot say anything else. `cargo xtask docs` writes them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use egress_agent::policy::schema::{egress_policy, service_entry};

mod command_line;
mod crd;
mod diagnostics;
mod json_schema;
mod tree;

/// A generated file.
#[derive(Debug)]
pub struct Page {
    /// Below the root of the workspace.
    pub path: &'static str,
    /// What stands in it.
    pub text: String,
}

impl Page {
    fn file(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(self.path)
    }

    /// Whether the file says something else.
    pub fn is_stale(&self) -> bool {
        fs::read_to_string(self.file()).ok().as_ref() != Some(&self.text)
    }

    /// Writes the file, and its directory if need be.
    pub fn write(&self) -> io::Result<()> {
        let file = self.file();
        fs::create_dir_all(file.parent().unwrap_or(&file))?;
        fs::write(file, &self.text)
    }
}

/// Every generated file.
pub fn all() -> Vec<Page> {
    let page = |path, text| Page { path, text };
    vec![
        page("deploy/crds/egresspolicies.egress.filter.yaml", crd::yaml()),
        page("docs/reference/command-line.md", command_line::markdown()),
        page("docs/reference/diagnostics.md", diagnostics::markdown()),
        page("docs/schemas/egresspolicy.json", json_schema::of(&egress_policy::OBJECT, "EgressPolicy")),
        page("docs/schemas/policies.json", json_schema::of_any(&SCHEMAS)),
        page("docs/schemas/serviceentry.json", json_schema::of(&service_entry::OBJECT, "ServiceEntry")),
    ]
}

/// The definition of `EgressPolicy`, in JSON.
pub fn definition() -> String {
    crd::definition().to_json()
}

/// Each kind, and the schema of its documents, beside that of all.
const SCHEMAS: [(&str, &str); 2] = [("EgressPolicy", "egresspolicy.json"), ("ServiceEntry", "serviceentry.json")];
