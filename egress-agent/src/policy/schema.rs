//! The shape of the documents: every field, what it means, and what can stand in it.
//!
//! Data and nothing else. The decoder takes the names of fields, the words of enums and the limits of the Kubernetes
//! API from here, and the JSON Schemas and the CRD are written from it, so what is read and what is described are the
//! same. Not everything that the decoder checks can be said here; nothing here refuses what it reads without a warning,
//! but for spellings that only protocol buffers have: an enum by number, a number in quotes.

pub mod egress_policy;
pub mod metadata;
pub mod service_entry;

/// A mapping whose fields are known.
#[derive(Debug, PartialEq, Eq)]
pub struct Object {
    /// What it is.
    pub doc: &'static str,
    /// Its fields, in the order in which people write them.
    pub fields: &'static [Field],
    /// Rules about several of its fields.
    pub rules: &'static [Rule],
}

impl Object {
    /// The field of this name.
    pub fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.name == name)
    }

    /// The names of the fields.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + Clone {
        self.fields.iter().map(|field| field.name)
    }
}

/// A field of an [`Object`].
#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    /// As documents spell it.
    pub name: &'static str,
    /// What it means, and what its absence means.
    pub doc: &'static str,
    /// Whether it must be there.
    pub required: bool,
    /// What can stand in it.
    pub shape: Shape,
}

/// What can stand in a field.
#[derive(Debug, PartialEq, Eq)]
pub enum Shape {
    /// Text.
    Text(&'static Text),
    /// A whole number.
    Integer(Range),
    /// A whole number, or text.
    IntegerOrText(Range, &'static Text),
    /// One of these words.
    Keyword(&'static [&'static str]),
    /// One of these words in any case, or empty text.
    AnyCase(&'static [&'static str]),
    /// A list.
    List(&'static List),
    /// One of these words, or a list.
    KeywordOrList(&'static [&'static str], &'static List),
    /// A mapping whose keys are data.
    Map(&'static Map),
    /// A mapping whose fields are known.
    Object(&'static Object),
    /// What Kubernetes writes for itself, of any type.
    Opaque,
}

/// What a text looks like.
#[derive(Debug, PartialEq, Eq)]
pub struct Text {
    /// Fewest characters.
    pub least: u32,
    /// Most characters, where there is a bound.
    pub most: Option<u32>,
    /// A regular expression that every valid text matches; some that match are not valid.
    pub pattern: Option<&'static str>,
}

/// The numbers from `low` to `high`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub low: i64,
    /// The last.
    pub high: i64,
}

/// What a list holds.
#[derive(Debug, PartialEq, Eq)]
pub struct List {
    /// Each of its items.
    pub items: Shape,
    /// Fewest items.
    pub least: u32,
    /// Most items that the Kubernetes API takes. Files have no limit.
    pub api_limit: u32,
    /// Whether no two items may be the same.
    pub distinct: bool,
}

/// What a mapping of data holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Map {
    /// What its keys look like.
    pub keys: &'static Text,
    /// Each of its values.
    pub values: Shape,
    /// Most keys that the Kubernetes API takes. Files have no limit.
    pub api_limit: u32,
}

/// A rule about several fields of an object.
#[derive(Debug, PartialEq, Eq)]
pub enum Rule {
    /// Exactly one of these fields is there.
    ExactlyOne(&'static [&'static str]),
    /// At least one field is there.
    NotEmpty,
    /// The first field goes only with the second.
    Needs(&'static str, &'static str),
    /// This field has no place here, for this reason.
    Without(&'static str, &'static str),
    /// The first number is not below the second, if both are there.
    NotBelow(&'static str, &'static str),
}

/// The words of a table of keywords.
pub const fn words<T, const N: usize>(table: &[(&'static str, T); N]) -> [&'static str; N] {
    let mut words = [""; N];
    let mut index = 0;
    while index < N {
        words[index] = table[index].0;
        index += 1;
    }
    words
}

const fn object(doc: &'static str, fields: &'static [Field]) -> Object {
    Object { doc, fields, rules: &[] }
}

const fn required(name: &'static str, shape: Shape, doc: &'static str) -> Field {
    Field { name, doc, required: true, shape }
}

const fn optional(name: &'static str, shape: Shape, doc: &'static str) -> Field {
    Field { name, doc, required: false, shape }
}

const fn text(least: u32, most: u32, pattern: &'static str) -> Text {
    Text { least, most: Some(most), pattern: Some(pattern) }
}

/// At least one item, in whose absence the list would mean either all or nothing.
const fn some(items: Shape, api_limit: u32) -> List {
    List { items, least: 1, api_limit, distinct: false }
}

const fn any(items: Shape, api_limit: u32) -> List {
    List { items, least: 0, api_limit, distinct: false }
}

/// A port.
const PORT: Range = Range { low: 1, high: 65_535 };

/// An IPv4 or IPv6 address.
static ADDRESS: Text = text(2, 45, r"^[0-9A-Fa-f.:]+$");
/// An address, or a prefix in CIDR notation.
static CIDR: Text = text(2, 49, r"^[0-9A-Fa-f.:]+(/[0-9]{1,3})?$");
/// The name of an object.
static OBJECT_NAME: Text = text(1, 253, r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$");
/// The name of a namespace.
static NAMESPACE: Text = text(1, 63, r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$");
/// A DNS label of either case.
static LABEL: Text = text(1, 63, r"^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$");
/// The key of a Kubernetes label.
static LABEL_KEY: Text =
    text(1, 317, r"^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$");
/// The value of a Kubernetes label.
static LABEL_VALUE: Text = text(0, 63, r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$");
/// Whatever else is text.
static ANY_TEXT: Text = Text { least: 0, most: None, pattern: None };

/// Labels as they are compared.
static LABELS: Map = Map { keys: &LABEL_KEY, values: Shape::Text(&LABEL_VALUE), api_limit: 64 };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{
        Kind,
        object::{EGRESS_GROUP, EGRESS_VERSIONS, ISTIO_GROUP, ISTIO_VERSIONS},
    };

    /// Every object below this one, itself included.
    fn objects(object: &'static Object, found: &mut Vec<&'static Object>) {
        found.push(object);
        for field in object.fields {
            below(&field.shape, found);
        }
    }

    fn below(shape: &'static Shape, found: &mut Vec<&'static Object>) {
        match shape {
            Shape::Object(object) => objects(object, found),
            Shape::List(list) | Shape::KeywordOrList(_, list) => below(&list.items, found),
            Shape::Map(map) => below(&map.values, found),
            Shape::Text(_)
            | Shape::Integer(_)
            | Shape::IntegerOrText(..)
            | Shape::Keyword(_)
            | Shape::AnyCase(_)
            | Shape::Opaque => {}
        }
    }

    #[test]
    fn every_object_and_field_is_described_once_and_rules_name_fields() {
        let mut found = Vec::new();
        objects(&service_entry::OBJECT, &mut found);
        objects(&egress_policy::OBJECT, &mut found);
        assert!(found.len() > 15);
        for object in found {
            assert!(object.doc.ends_with('.'), "{}", object.doc);
            for (index, field) in object.fields.iter().enumerate() {
                assert!(field.doc.ends_with('.'), "{}", field.name);
                assert!(object.fields[..index].iter().all(|other| other.name != field.name), "{}", field.name);
            }
            for rule in object.rules {
                let names: &[&str] = match rule {
                    Rule::ExactlyOne(names) => names,
                    Rule::NotEmpty => &[],
                    Rule::Needs(a, b) | Rule::NotBelow(a, b) => &[a, b],
                    Rule::Without(name, _) => &[name],
                };
                assert!(names.iter().all(|name| object.field(name).is_some()), "{rule:?}");
            }
        }
    }

    #[test]
    fn groups_versions_and_kinds_are_those_that_are_read() {
        let of = |object: &'static Object, field: &str| match object.field(field).unwrap().shape {
            Shape::Keyword(words) => words,
            _ => panic!("{field} is not a keyword"),
        };
        let versions = |group: &str, versions: &[&str]| -> Vec<String> {
            versions.iter().map(|version| format!("{group}/{version}")).collect()
        };
        assert_eq!(of(&service_entry::OBJECT, "apiVersion"), versions(ISTIO_GROUP, &ISTIO_VERSIONS));
        assert_eq!(of(&egress_policy::OBJECT, "apiVersion"), versions(EGRESS_GROUP, &EGRESS_VERSIONS));
        assert_eq!(of(&service_entry::OBJECT, "kind"), [Kind::ServiceEntry.as_str()]);
        assert_eq!(of(&egress_policy::OBJECT, "kind"), [Kind::EgressPolicy.as_str()]);
    }
}
