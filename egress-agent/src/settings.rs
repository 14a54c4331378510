//! Where the settings of `run` come from: flags, the environment, a file, the defaults, in that order of strength.
//!
//! What the file says becomes the default of the flag, so that clap knows one order of strength, and `run --help` states
//! what holds. The file is a mapping of flags, without their dashes, to values; only root can have written it. Where it tells the
//! agent to be found, whoever looks for an agent believes it.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, Command, CommandFactory, FromArgMatches,
    builder::BoolishValueParser,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};
use thiserror::Error;

use crate::{
    cli::{self, Cli},
    policy::{
        diagnostic::{printable, quoted},
        load::{LoadError, read_trusted},
        suggest::{choice, nearest},
        yaml::{Entry, Node, Problem, Scalar, ScalarKind, Span, Value, documents},
    },
    text::printable_bytes,
};

/// The file that is read if it is there and no other is named.
pub const DEFAULT_FILE: &str = "/etc/egress/agent.yaml";
/// The variable that names another.
pub const CONFIG: &str = "EGRESS_CONFIG";

/// The subcommand whose flags the file sets.
const RUN: &str = "run";
/// The subcommands that look for an agent.
const SEEKERS: [&str; 3] = ["status", "reload", "detach"];
/// The flags that tell them where.
const PLACES: [&str; 2] = ["pin-dir", "run-dir"];

/// Why the settings are not known.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file cannot be read, or cannot be trusted.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What the file says is wrong.
    #[error("{}", list(.0))]
    Invalid(Vec<Complaint>),
}

/// Something that is wrong in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// The file.
    pub file: PathBuf,
    /// Where in it.
    pub at: Span,
    /// The setting; empty if it is about none.
    pub setting: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub help: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, at, setting, message, help } = self;
        let file = printable_bytes(&**file);
        write!(f, "{file}:{}:{}: ", at.line, at.column)?;
        if !setting.is_empty() {
            write!(f, "{}: ", printable(setting))?;
        }
        write!(f, "{message}")?;
        if help.is_empty() { Ok(()) } else { write!(f, "; {help}") }
    }
}

fn list(complaints: &[Complaint]) -> String {
    complaints.iter().map(ToString::to_string).collect::<Vec<_>>().join("\nerror: ")
}

/// The command line, with what the file says as defaults. `env` looks up a variable.
pub fn command(args: &[OsString], env: impl Fn(&str) -> Option<OsString>) -> Result<Command, SettingsError> {
    let command = Cli::command().mut_subcommand(RUN, |run| run.mut_args(with_strict_switch));
    let asked = Asked::of(args, &command);
    let is_seeker = asked.subcommand.is_some_and(|name| SEEKERS.iter().any(|seeker| name == *seeker));
    if !is_seeker && asked.subcommand != Some(OsStr::new(RUN)) {
        return Ok(command);
    }
    let named = asked.file.or_else(|| env(CONFIG)).filter(|name| !name.is_empty()).map(PathBuf::from);
    match settings(&command, named, is_seeker) {
        Ok(settings) => Ok(settings.into_iter().fold(command, with_default)),
        // Whoever mends a file needs the help more than what the file says.
        Err(_) if asked.help => Ok(command),
        Err(error) => Err(error),
    }
}

/// Parses the command line by a [`command`]. Several paths in one variable are separated as in `PATH`; a flag takes one.
pub fn parse(mut command: Command, args: Vec<OsString>) -> Result<Cli, clap::Error> {
    let matches = command.try_get_matches_from_mut(args)?;
    let source = matches.subcommand_matches(RUN).and_then(|run| run.value_source("policies"));
    let mut cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    if let cli::Command::Run(run) = &mut cli.command
        && source == Some(ValueSource::EnvVariable)
    {
        let paths = run.policies.iter().flat_map(|paths| env::split_paths(paths).collect::<Vec<_>>());
        run.policies = paths.filter(|path| !path.as_os_str().is_empty()).collect();
    }
    if let cli::Command::Run(run) = &cli.command {
        complete(run, &mut command)?;
    }
    Ok(cli)
}

/// Without the Kubernetes API, it must be said which policies, and for whom.
fn complete(run: &cli::RunArgs, command: &mut Command) -> Result<(), clap::Error> {
    let missing: Vec<&str> =
        [("--policies <PATH>", run.policies.is_empty()), ("--cgroup <PATH>", run.cgroup.is_none())]
            .into_iter()
            .filter_map(|(flag, is_missing)| (is_missing && !run.cluster.kubernetes).then_some(flag))
            .collect();
    if missing.is_empty() {
        return Ok(());
    }
    command.build();
    let owner = command.find_subcommand_mut(RUN).expect("`run` is there");
    let message = format!("the following required arguments were not provided:\n  {}", missing.join("\n  "));
    Err(owner.error(ErrorKind::MissingRequiredArgument, message))
}

/// The subcommand that is asked for, also where the rest of the command line is wrong.
pub fn subcommand(args: &[OsString]) -> Option<&OsStr> {
    Asked::of(args, &Cli::command()).subcommand
}

/// A switch in the environment is on or off, and nothing else: what is misspelt must not switch anything.
fn with_strict_switch(arg: Arg) -> Arg {
    if is_switch(&arg) { arg.value_parser(BoolishValueParser::new()) } else { arg }
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

/// What must be known of the command line before it can be parsed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked<'a> {
    subcommand: Option<&'a OsStr>,
    file: Option<OsString>,
    help: bool,
}

impl<'a> Asked<'a> {
    fn of(args: &'a [OsString], command: &Command) -> Self {
        let mut asked = Self::default();
        let takes_value = |flag: &[u8]| {
            let name = flag.strip_prefix(b"--").unwrap_or_default();
            command.get_arguments().any(|arg| arg.get_long().is_some_and(|long| long.as_bytes() == name))
        };
        let mut args = args.iter().skip(1).take_while(|arg| *arg != "--");
        while let Some(arg) = args.next() {
            match arg.as_bytes() {
                b"--config" => asked.file = args.next().cloned(),
                b"--help" | b"-h" => asked.help = true,
                flag if flag.starts_with(b"--config=") => {
                    asked.file = Some(OsStr::from_bytes(&flag[b"--config=".len()..]).to_owned());
                }
                _ if asked.subcommand.is_some() => {}
                b"help" => asked.help = true,
                flag if takes_value(flag) => drop(args.next()),
                flag if flag.starts_with(b"-") => {}
                _ => asked.subcommand = Some(arg),
            }
        }
        asked
    }
}

/// What the file says of one flag.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    flag: String,
    values: Vec<OsString>,
}

/// What the file says; nothing if none is named and the default one is not there. Whoever only seeks an agent is not stopped by
/// what is wrong with other settings. `/dev/null`, to which everybody may write, is no file of settings.
fn settings(command: &Command, named: Option<PathBuf>, only_places: bool) -> Result<Vec<Setting>, SettingsError> {
    if named.as_deref() == Some(Path::new("/dev/null")) {
        return Ok(Vec::new());
    }
    let is_named = named.is_some();
    let file = named.unwrap_or_else(|| DEFAULT_FILE.into());
    let bytes = match read_trusted(&file) {
        Err(LoadError::Unreadable { cause, .. }) if !is_named && cause.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    match String::from_utf8(bytes) {
        Ok(text) => settings_in(command, &file, &text, only_places),
        Err(_) => Err(LoadError::Unfit { path: file, message: "it is not UTF-8 text".to_owned() }.into()),
    }
}

fn settings_in(command: &Command, file: &Path, text: &str, only_places: bool) -> Result<Vec<Setting>, SettingsError> {
    let mut reader = Reader { command, file, complaints: Vec::new() };
    let mut settings = reader.read(text);
    if only_places {
        settings.retain(|setting| PLACES.contains(&&*setting.flag));
        let matters = |setting: &str| setting.is_empty() || PLACES.contains(&setting);
        reader.complaints.retain(|complaint| matters(&complaint.setting));
    }
    if reader.complaints.is_empty() { Ok(settings) } else { Err(SettingsError::Invalid(reader.complaints)) }
}

/// Reads the file, and keeps what is wrong with it.
struct Reader<'a> {
    command: &'a Command,
    file: &'a Path,
    complaints: Vec<Complaint>,
}

impl Reader<'_> {
    fn read(&mut self, text: &str) -> Vec<Setting> {
        let mut settings = Vec::new();
        let mut roots = Vec::new();
        for document in documents(text) {
            for Problem { span, message, help, .. } in document.problems {
                self.complain(span, "", message, help.unwrap_or_default());
            }
            roots.extend(document.root);
        }
        for (index, root) in roots.iter().enumerate() {
            match &root.value {
                _ if index > 0 => self.complain(root.span, "", "a second document", "put all settings in one"),
                Value::Mapping(entries) => settings.extend(entries.iter().filter_map(|entry| self.setting(entry))),
                _ if kind(root) == Some(ScalarKind::Null) => {}
                _ => self.complain(root.span, "", "settings are a mapping", "write one `flag: value` a line"),
            }
        }
        settings
    }

    fn setting(&mut self, entry: &Entry<'_>) -> Option<Setting> {
        let Some((arg, owner)) = arguments(self.command).find(|(arg, _)| arg.get_long() == Some(&entry.key)) else {
            let known = arguments(self.command).filter_map(|(arg, _)| arg.get_long());
            let help = match nearest(&entry.key, known) {
                Some(name) => format!("did you mean `{name}`?"),
                None => "settings are the flags that `egress-agent run --help` lists, without `--`".to_owned(),
            };
            self.complain(entry.key_span, &entry.key, format!("unknown setting {}", quoted(&entry.key)), help);
            return None;
        };
        let values = if is_switch(arg) { self.switch(entry)? } else { self.values(entry, arg, owner)? };
        Some(Setting { flag: entry.key.to_string(), values })
    }

    fn switch(&mut self, entry: &Entry<'_>) -> Option<Vec<OsString>> {
        match &entry.value.value {
            Value::Scalar(Scalar { text, plain: true }) if matches!(&**text, "true" | "false") => {
                Some(vec![OsString::from(&**text)])
            }
            _ => {
                self.wrong(entry, &entry.value, "a switch", "write `true` or `false`, without quotes");
                None
            }
        }
    }

    fn values(&mut self, entry: &Entry<'_>, arg: &Arg, owner: &Command) -> Option<Vec<OsString>> {
        let one = [&entry.value];
        let nodes: Vec<&Node<'_>> = match &entry.value.value {
            Value::Sequence(items) if items.is_empty() => {
                self.wrong(entry, &entry.value, "at least one value", "give it one or delete the line");
                return None;
            }
            Value::Sequence(items) if matches!(arg.get_action(), ArgAction::Append) => items.iter().collect(),
            _ => one.to_vec(),
        };
        let before = self.complaints.len();
        let values = nodes.into_iter().filter_map(|node| self.value(entry, node, arg, owner)).collect();
        (self.complaints.len() == before).then_some(values)
    }

    fn value(&mut self, entry: &Entry<'_>, node: &Node<'_>, arg: &Arg, owner: &Command) -> Option<OsString> {
        let Value::Scalar(scalar) = &node.value else {
            self.wrong(entry, node, "one value", "write one; if it has a colon or brackets, put it in quotes");
            return None;
        };
        match scalar.kind() {
            ScalarKind::Null => self.wrong(entry, node, "a value", "give it one or delete the line"),
            ScalarKind::Bool => self.wrong(entry, node, "text", "put it in quotes if it is meant as text"),
            ScalarKind::Text | ScalarKind::Integer | ScalarKind::OddNumber => {
                let value = OsString::from(&*scalar.text);
                match refusal(&entry.key, arg, owner, &value) {
                    None => return Some(value),
                    Some((message, help)) => self.complain(node.span, &entry.key, message, help),
                }
            }
        }
        None
    }

    fn wrong(&mut self, entry: &Entry<'_>, node: &Node<'_>, expected: &str, help: &str) {
        let found = match &node.value {
            Value::Mapping(_) => "a mapping".to_owned(),
            Value::Sequence(items) if items.is_empty() => "an empty list".to_owned(),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Scalar(scalar) => match scalar.kind() {
                ScalarKind::Null => "nothing".to_owned(),
                ScalarKind::Bool => format!("{}, which YAML reads as a boolean", quoted(&scalar.text)),
                ScalarKind::Integer | ScalarKind::OddNumber => format!("the number {}", quoted(&scalar.text)),
                ScalarKind::Text => format!("the text {}", quoted(&scalar.text)),
            },
        };
        self.complain(node.span, &entry.key, format!("{expected} was expected, and this is {found}"), help);
    }

    fn complain(&mut self, at: Span, setting: &str, message: impl Into<String>, help: impl Into<String>) {
        let (message, help) = (message.into(), help.into());
        self.complaints.push(Complaint { file: self.file.to_owned(), at, setting: setting.to_owned(), message, help });
    }
}

fn kind(node: &Node<'_>) -> Option<ScalarKind> {
    match &node.value {
        Value::Scalar(scalar) => Some(scalar.kind()),
        Value::Sequence(_) | Value::Mapping(_) => None,
    }
}

/// The arguments that the file can set, each with the command it belongs to. It cannot name another file.
fn arguments(command: &Command) -> impl Iterator<Item = (&Arg, &Command)> {
    let run = command.find_subcommand(RUN).into_iter();
    let of = |owner| Command::get_arguments(owner).map(move |arg| (arg, owner));
    run.chain([command]).flat_map(of).filter(|(arg, _)| arg.get_long().is_some_and(|long| long != "config"))
}

/// Why a flag does not take a value, and what it takes instead: the flag is parsed with nothing else around it.
fn refusal(flag: &str, arg: &Arg, owner: &Command, value: &OsStr) -> Option<(String, String)> {
    let alone = owner.clone().no_binary_name(true).mut_args(|arg| arg.required(false).env(None::<&str>));
    let mut text = OsString::from(format!("--{flag}="));
    text.push(value);
    let error = alone.try_get_matches_from([text]).err()?;
    let value = value.to_string_lossy();
    match error.kind() {
        ErrorKind::InvalidValue => {
            let help = match error.get(ContextKind::ValidValue) {
                Some(ContextValue::Strings(known)) if !known.is_empty() => {
                    choice(&value, &known.iter().map(String::as_str).collect::<Vec<_>>())
                }
                _ => format!("it takes {}", arg.get_value_names().unwrap_or_default().join(" ")),
            };
            Some((format!("{} is not a value of `{flag}`", quoted(&value)), help))
        }
        ErrorKind::ValueValidation | ErrorKind::InvalidUtf8 | ErrorKind::WrongNumberOfValues => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            Some((format!("{} is not a value of `{flag}`", quoted(&value)), printable(&cause).into_owned()))
        }
        // The rest of the command line is what is missing here.
        _ => None,
    }
}

/// The command with a setting as the default of its flag. A default satisfies what is required.
fn with_default(command: Command, setting: Setting) -> Command {
    let Setting { flag, values } = setting;
    let set = |owner: Command| {
        let with = |arg: Arg| {
            if arg.get_long() != Some(&flag) {
                return arg;
            }
            let switched_on = is_switch(&arg) && values.iter().any(|value| value == "true");
            let arg = if switched_on { with_note(arg) } else { arg };
            arg.required(false).default_values(values.clone())
        };
        owner.mut_args(with)
    };
    let seekers: &[&str] = if PLACES.contains(&&*flag) { &SEEKERS } else { &[] };
    let command = seekers.iter().fold(command, |command, seeker| command.mut_subcommand(seeker, set));
    set(command.mut_subcommand(RUN, set))
}

/// Help does not state the default of a switch by itself.
fn with_note(arg: Arg) -> Arg {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    arg.help(format!("{help} [default: true]"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::compile::NodeAction;

    const FILE: &str = "policies: [/a, /b]
cgroup: system.slice
default: allow
no-dns: true
no-loopback: false
log: debug
";

    /// A file in a directory that nobody else can write.
    fn file(text: &str) -> (tempfile::TempDir, String) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.yaml");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (directory, path)
    }

    fn words(line: &str) -> Vec<OsString> {
        line.split_ascii_whitespace().map(OsString::from).collect()
    }

    fn run(line: &str) -> cli::RunArgs {
        let args = words(line);
        match parse(command(&args, |_| None).unwrap(), args).unwrap().command {
            cli::Command::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn whoever_seeks_an_agent_looks_where_the_file_says() {
        let (_directory, path) = file("pin-dir: /pins\nrun-dir: /run/x\noutput: json\ncgruop: misspelt\n");
        let parsed = |line: &str| {
            let args = words(line);
            parse(command(&args, |_| None).unwrap(), args).unwrap().command
        };
        let of = |seeker: &str, more: &str| match parsed(&format!("egress-agent {seeker} --config {path}{more}")) {
            cli::Command::Status(cli::StatusArgs { agent, output, .. }) => {
                assert_eq!(output, None);
                (agent.pin_dir, agent.run_dir)
            }
            cli::Command::Reload(args) => (args.agent.pin_dir, args.agent.run_dir),
            cli::Command::Detach(args) => (args.pin_dir, "/run/x".into()),
            other => panic!("{other:?}"),
        };
        for seeker in SEEKERS {
            assert_eq!(of(seeker, ""), ("/pins".into(), "/run/x".into()), "{seeker}");
            assert_eq!(of(seeker, " --pin-dir /flag").0, Path::new("/flag"), "{seeker}");
        }
        let (_directory, path) = file("pin-dir: [/a, /b]\n");
        let seek = |name: &str| command(&words(&format!("egress-agent {name} --config {path}")), |_| None);
        assert!(seek("status").is_err() && seek("detach").is_err());
        assert!(seek("check").is_ok());
        let nothing = words("egress-agent detach --config /dev/null");
        assert!(parse(command(&nothing, |_| None).unwrap(), nothing).is_ok());
    }

    /// What is said of a file with one line.
    #[track_caller]
    fn complains(line: &str, expected: &[&str]) {
        let text = format!("# settings\n{line}\n");
        let error = settings_in(&Cli::command(), Path::new("agent.yaml"), &text, false).unwrap_err().to_string();
        assert!(expected.iter().all(|word| error.contains(word)), "{expected:?} in {error}");
    }

    #[test]
    fn every_flag_of_run_has_a_variable_of_its_name() {
        let command = Cli::command();
        assert!(arguments(&command).count() > 8);
        for arg in arguments(&command).map(|(arg, _)| arg).chain(command.get_arguments()) {
            let long = arg.get_long().unwrap();
            let variable = format!("EGRESS_{}", long.replace('-', "_").to_uppercase());
            assert_eq!(arg.get_env(), Some(OsStr::new(&variable)), "--{long}");
        }
    }

    #[test]
    fn the_file_sets_defaults_and_flags_are_stronger() {
        let (_directory, path) = file(FILE);
        for line in
            [format!("egress-agent run --config {path}"), format!("egress-agent --config={path} --log info run")]
        {
            let run = run(&line);
            assert_eq!(run.policies, [Path::new("/a"), Path::new("/b")]);
            assert_eq!((run.cgroup.as_deref(), run.default), (Some(Path::new("system.slice")), NodeAction::Allow));
            assert_eq!((run.no_dns, run.no_loopback, run.pin_dir), (true, false, "/sys/fs/bpf/egress".into()));
        }
        let stronger = run(&format!("egress-agent run --config {path} --policies /c --default Deny --no-loopback"));
        assert_eq!(stronger.policies, [Path::new("/c")]);
        assert_eq!((stronger.default, stronger.no_loopback), (NodeAction::Deny, true));
    }

    #[test]
    fn the_file_is_found_by_flag_then_by_variable() {
        let (_one, by_flag) = file("policies: /flag\ncgroup: /c\n");
        let (_two, by_variable) = file("policies: /variable\ncgroup: /c\n");
        let policies = |line: &str| {
            let env = |name: &str| (name == CONFIG).then(|| OsString::from(&by_variable));
            let args = words(line);
            match parse(command(&args, env).unwrap(), args).unwrap().command {
                cli::Command::Run(run) => run.policies,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(policies("egress-agent run"), [Path::new("/variable")]);
        assert_eq!(policies(&format!("egress-agent run --config {by_flag}")), [Path::new("/flag")]);
    }

    #[test]
    fn help_states_what_the_file_says_even_if_that_is_wrong() {
        let help = |path: &str, line: &str| {
            let args = words(&line.replace("FILE", path));
            let command = command(&args, |_| None).unwrap();
            command.try_get_matches_from(args).unwrap_err().to_string()
        };
        let (_directory, path) = file(FILE);
        for line in ["egress-agent run --config FILE --help", "egress-agent --config FILE help run"] {
            let text = help(&path, line);
            for words in [
                "[default: /a /b]",
                "[default: system.slice]",
                "[default: allow]",
                "/etc/resolv.conf by default [default: true]",
            ] {
                assert!(text.contains(words), "{words} in\n{text}");
            }
        }
        let (_directory, broken) = file("polices: /x");
        assert!(help(&broken, "egress-agent run --config FILE -h").contains("[default: Deny]"));
    }

    #[test]
    fn other_commands_do_not_read_the_file() {
        for line in ["egress-agent check --config /nonexistent run", "egress-agent --log info check run -- --config x"]
        {
            assert!(command(&words(line), |_| None).is_ok(), "{line}");
        }
        let line = words("egress-agent --log info run --config /nonexistent");
        assert!(matches!(command(&line, |_| None), Err(SettingsError::Load(LoadError::Unreadable { .. }))));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place_and_what_to_write() {
        complains("polices: /x", &["agent.yaml:2:1: polices: unknown setting `polices`", "did you mean `policies`?"]);
        complains("xyzzy: 1", &["unknown setting", "egress-agent run --help"]);
        complains("config: /x", &["unknown setting `config`"]);
        complains("cgroup: a\ncgroup: b", &["agent.yaml:3:1: ", "`cgroup` is given twice", "delete one"]);
        complains("cgroup: [a, b]", &["agent.yaml:2:9: cgroup: one value was expected, and this is a list"]);
        complains("cgroup: {a: b}", &["this is a mapping", "write one"]);
        complains("cgroup:", &["cgroup: a value was expected, and this is nothing", "delete the line"]);
        complains("cgroup: ''", &["`` is not a value of `cgroup`", "it takes PATH"]);
        complains("pin-dir: yes", &["`yes`, which YAML reads as a boolean", "put it in quotes"]);
        complains("policies: []", &["an empty list", "delete the line"]);
        complains("policies: [/a, [/b]]", &["agent.yaml:2:16: policies: one value"]);
        complains("default: Alow", &["agent.yaml:2:10: default: `Alow` is not a value", "did you mean `Allow`?"]);
        complains("log: 1", &["log: `1` is not a value of `log`; one of `error`"]);
        complains("no-dns: yes", &["agent.yaml:2:9: no-dns: a switch was expected", "`true` or `false`"]);
        complains("no-dns: 'true'", &["this is the text `true`", "without quotes"]);
        complains("[a]", &["agent.yaml:2:1: settings are a mapping"]);
        complains("cgroup: a\n---\ncgroup: b", &["agent.yaml:4:1: a second document"]);
        complains("cgroup: [", &["agent.yaml:3:1: this is not YAML"]);
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        complains(
            "polices: /x\nno-dns: 1\ndefault: Alow",
            &["agent.yaml:2:1", "\nerror: agent.yaml:3:9", "agent.yaml:4:10"],
        );
    }

    #[test]
    fn an_empty_file_sets_nothing() {
        for text in ["", "# nothing\n", "---\n"] {
            assert_eq!(settings_in(&Cli::command(), Path::new("agent.yaml"), text, false).unwrap(), []);
        }
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let (_directory, path) = file(FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let error = command(&words(&format!("egress-agent run --config {path}")), |_| None).unwrap_err().to_string();
        assert!(error.contains(&path) && error.contains("others than root") && error.contains("chmod go-w"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_text_is_refused() {
        let (_directory, path) = file("");
        fs::write(&path, b"cgroup: \xff\n").unwrap();
        let error = command(&words(&format!("egress-agent run --config {path}")), |_| None).unwrap_err().to_string();
        assert!(error.contains(&path) && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn the_command_stays_a_valid_one() {
        let (_directory, path) = file(FILE);
        command(&words(&format!("egress-agent run --config {path}")), |_| None).unwrap().debug_assert();
    }
}
