//! An archive of an image: the OCI image layout with one layer, and beside it the `manifest.json` that engines without
//! it read. The bytes depend on what is packed alone.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::dockerfile::Dockerfile;
use crate::{dist::tarball, process};

/// The Go names of this platform, which is the only one that is built.
const PLATFORM: &str = r#""architecture":"amd64","os":"linux""#;
const TYPE: &str = "application/vnd.oci.image";

pub struct Image<'a> {
    pub dockerfile: &'a Dockerfile,
    pub name: &'a str,
    pub version: &'a str,
    /// When it was made, in seconds.
    pub epoch: &'a str,
}

/// A file that is named by its digest.
struct Blob {
    digest: String,
    size: u64,
}

impl Blob {
    /// Moves a file to where the layout has blobs.
    fn take(file: &Path, layout: &Path) -> Result<Self> {
        let size = fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?.len();
        let sum = process::capture(Command::new("sha256sum").arg(file), "computing a checksum")?;
        let digest = sum.split(' ').next().context("sha256sum prints a checksum")?.to_owned();
        let blob = Self { digest, size };
        let to = layout.join(blob.path());
        fs::create_dir_all(to.parent().unwrap_or(layout))
            .and_then(|()| fs::rename(file, &to))
            .with_context(|| format!("cannot move {} to {}", file.display(), to.display()))?;
        Ok(blob)
    }

    fn write(text: &str, layout: &Path) -> Result<Self> {
        let file = layout.join("blob");
        write(&file, text)?;
        Self::take(&file, layout)
    }

    fn path(&self) -> PathBuf {
        Path::new("blobs/sha256").join(&self.digest)
    }

    fn descriptor(&self, kind: &str) -> String {
        format!(r#""mediaType":"{TYPE}.{kind}","digest":"sha256:{}","size":{}"#, self.digest, self.size)
    }
}

impl Image<'_> {
    /// Packs a root file system; `layout` is an empty directory.
    pub fn pack(&self, root: &Path, layout: &Path, archive: &Path) -> Result<()> {
        let tar = layout.join("layer");
        tarball::pack_contents(root, &tar, self.epoch)?;
        let layer = Blob::take(&tar, layout)?;
        let config = Blob::write(&self.config(&layer)?, layout)?;
        let manifest = Blob::write(
            &format!(
                r#"{{"schemaVersion":2,"mediaType":"{TYPE}.manifest.v1+json","config":{{{}}},"layers":[{{{}}}]}}"#,
                config.descriptor("config.v1+json"),
                layer.descriptor("layer.v1.tar"),
            ),
            layout,
        )?;
        let (name, version) = (self.name, self.version);
        write(&layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        write(
            &layout.join("index.json"),
            &format!(
                r#"{{"schemaVersion":2,"mediaType":"{TYPE}.index.v1+json","manifests":[{{{},"platform":{{{PLATFORM}}},"annotations":{{"io.containerd.image.name":"localhost/{name}:{version}","org.opencontainers.image.ref.name":"{version}"}}}}]}}"#,
                manifest.descriptor("manifest.v1+json"),
            ),
        )?;
        write(
            &layout.join("manifest.json"),
            &format!(
                r#"[{{"Config":"{}","RepoTags":["localhost/{name}:{version}"],"Layers":["{}"]}}]"#,
                config.path().display(),
                layer.path().display(),
            ),
        )?;
        tarball::pack_contents(layout, archive, self.epoch)
    }

    fn config(&self, layer: &Blob) -> Result<String> {
        let mut date = Command::new("date");
        date.args(["--utc", "--date", &format!("@{}", self.epoch), "+%Y-%m-%dT%H:%M:%SZ"]);
        let created = process::capture(&mut date, "converting a time")?;
        let labels = self.dockerfile.labels.iter().map(|(name, value)| format!(r#""{name}":"{value}""#));
        Ok(format!(
            r#"{{"created":"{}",{PLATFORM},"config":{{"Entrypoint":{},"WorkingDir":"/","Labels":{{{}}}}},"rootfs":{{"type":"layers","diff_ids":["sha256:{}"]}},"history":[{{"created":"{}","created_by":"cargo xtask image"}}]}}"#,
            created.trim(),
            self.dockerfile.entrypoint,
            labels.collect::<Vec<_>>().join(","),
            layer.digest,
            created.trim(),
        ))
    }
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_names_each_of_its_blobs_by_digest() {
        let directory = tempfile::tempdir().unwrap();
        let (root, layout) = (directory.path().join("root"), directory.path().join("layout"));
        for made in [&root, &layout] {
            fs::create_dir(made).unwrap();
        }
        fs::write(root.join("program"), "program").unwrap();
        let text = "FROM scratch\nCOPY program /program\nLABEL a=\"b\"\nENTRYPOINT [\"/program\"]\n";
        let dockerfile = Dockerfile::parse(text, "1").unwrap();
        let image = Image { dockerfile: &dockerfile, name: "name", version: "1", epoch: "1000000000" };
        let archive = directory.path().join("image.tar");
        image.pack(&root, &layout, &archive).unwrap();
        let mut list = Command::new("tar");
        let listed = process::capture(list.arg("--list").arg("--file").arg(&archive), "listing").unwrap();
        let blobs = listed.lines().filter(|line| line.starts_with("blobs/sha256/") && !line.ends_with('/'));
        assert_eq!(blobs.clone().count(), 3, "{listed}");
        let mut texts = vec![fs::read_to_string(layout.join("index.json")).unwrap()];
        for blob in blobs {
            let bytes = fs::read(layout.join(blob)).unwrap();
            texts.push(String::from_utf8_lossy(&bytes).into_owned());
            let digest = blob.strip_prefix("blobs/sha256/").unwrap();
            let sum = process::capture(Command::new("sha256sum").arg(layout.join(blob)), "computing").unwrap();
            assert!(sum.starts_with(digest), "{sum}");
            let named = |text: &String| text.contains(&format!("\"sha256:{digest}\""));
            let others =
                fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|other| fs::read(other.unwrap().path()));
            let others = others.map(|bytes| String::from_utf8_lossy(&bytes.unwrap()).into_owned());
            assert!(others.chain([texts[0].clone()]).any(|text| named(&text)), "{digest} is named nowhere");
        }
        assert!(texts.iter().any(|text| text.contains(r#""created":"2001-09-09T01:46:40Z""#)), "{texts:?}");
    }
}
