//! The Dockerfile of an image that is made of nothing but files: `FROM scratch`, `ARG VERSION`, `COPY`, `LABEL`,
//! `ENTRYPOINT`, one a line. Any other instruction is an error, so that an engine and this build the same image.

use anyhow::{Context as _, Result, bail, ensure};

#[derive(Debug, PartialEq, Eq)]
pub struct Dockerfile {
    /// From the build context, to below the root.
    pub copies: Vec<(String, String)>,
    /// In the order of the file.
    pub labels: Vec<(String, String)>,
    /// JSON, as it stands there: a list of strings.
    pub entrypoint: String,
}

impl Dockerfile {
    pub fn parse(text: &str, version: &str) -> Result<Self> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let mut dockerfile = Self { copies: Vec::new(), labels: Vec::new(), entrypoint: String::new() };
        for (index, line) in lines {
            dockerfile.follow(line, version).with_context(|| format!("line {}: {line}", index + 1))?;
        }
        ensure!(!dockerfile.copies.is_empty() && !dockerfile.entrypoint.is_empty(), "it copies or starts nothing");
        Ok(dockerfile)
    }

    fn follow(&mut self, line: &str, version: &str) -> Result<()> {
        match line.split_once(' ').context("an instruction has an argument")? {
            ("FROM", "scratch") | ("ARG", "VERSION") => {}
            ("COPY", paths) => {
                let (from, to) = paths.split_once(' ').context("COPY FROM /TO")?;
                let to = to.strip_prefix('/').filter(|to| !to.ends_with('/')).context("a full path is needed")?;
                self.copies.push((from.to_owned(), to.to_owned()));
            }
            ("LABEL", label) => {
                let (name, value) = label.split_once('=').context("LABEL NAME=\"VALUE\"")?;
                let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).context("no quotes")?;
                ensure!(!value.contains(['"', '\\']), "a value is plain text");
                self.labels.push((name.to_owned(), value.replace("$VERSION", version)));
            }
            ("ENTRYPOINT", list) if list.starts_with('[') => list.clone_into(&mut self.entrypoint),
            _ => bail!("the instruction is not known here"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_image_is_made_of_is_read() {
        let text =
            "# A comment\nFROM scratch\nARG VERSION\nCOPY a /b/c\nLABEL t=\"v $VERSION\"\n\nENTRYPOINT [\"/b/c\"]\n";
        let pair = |a: &str, b: &str| vec![(a.to_owned(), b.to_owned())];
        let expected =
            Dockerfile { copies: pair("a", "b/c"), labels: pair("t", "v 1.2"), entrypoint: "[\"/b/c\"]".into() };
        assert_eq!(Dockerfile::parse(text, "1.2").unwrap(), expected);
    }

    #[test]
    fn what_an_engine_would_do_beyond_that_is_refused() {
        for line in ["FROM debian", "RUN true", "COPY a /b/", "COPY a b", "LABEL a=b", "ENTRYPOINT a", "USER"] {
            let text = format!("FROM scratch\nCOPY a /a\n{line}\nENTRYPOINT [\"/a\"]\n");
            let error = format!("{:#}", Dockerfile::parse(&text, "1").unwrap_err());
            assert!(error.starts_with(&format!("line 3: {line}: ")), "{error}");
        }
        assert!(Dockerfile::parse("FROM scratch\n", "1").is_err());
    }

    #[test]
    fn the_dockerfile_of_this_workspace_is_understood() {
        let dockerfile = Dockerfile::parse(include_str!("../../../deploy/container/Dockerfile"), "1.2").unwrap();
        assert_eq!(dockerfile.copies, [("egress-agent".to_owned(), "egress-agent".to_owned())]);
        assert!(dockerfile.labels.contains(&("org.opencontainers.image.version".into(), "1.2".into())));
        assert!(dockerfile.labels.iter().all(|(name, _)| name.starts_with("org.opencontainers.image.")));
    }
}
