//! JSON Schemas for editors, in draft 7: the newest that yaml-language-server reads in every version that is in use.

use egress_agent::policy::schema::{Field, List, Object, Range, Rule, Shape, Text};

use super::tree::{Map, Tree, list};

const DRAFT: &str = "http://json-schema.org/draft-07/schema#";

/// The schema of one kind of document.
pub fn of(kind: &'static Object, title: &str) -> String {
    let schema = Map::new().with("$schema", DRAFT).with("title", title).with("description", kind.doc);
    Tree::from(schema.and(object(kind))).to_json()
}

/// The schema of a file in which documents of several kinds stand; each of these has its own schema beside it.
pub fn of_any(kinds: &[(&str, &str)]) -> String {
    let branch = |(kind, file): &(&str, &str)| {
        let kind = Map::new().with("kind", Map::new().with("const", *kind));
        Map::new()
            .with("if", Map::new().with("properties", kind).with("required", list(["kind"])))
            .with("then", Map::new().with("$ref", *file))
    };
    let schema = Map::new()
        .with("$schema", DRAFT)
        .with("title", "Policies")
        .with("description", "EgressPolicy and ServiceEntry documents. Other kinds are not looked into.")
        .with("type", "object")
        .with("allOf", list(kinds.iter().map(branch)));
    Tree::from(schema).to_json()
}

fn object(object: &Object) -> Map {
    let mut properties = Map::new();
    for Field { name, doc, shape, .. } in object.fields {
        let is_refused = object.rules.iter().any(|rule| matches!(rule, Rule::Without(field, _) if field == name));
        let field = if is_refused { false.into() } else { Tree::from(described(doc, shape)) };
        properties = properties.with(name, field);
    }
    let required: Vec<&str> = object.fields.iter().filter(|field| field.required).map(|field| field.name).collect();
    let mut schema = Map::new().with("type", "object").with("properties", properties);
    if !required.is_empty() {
        schema = schema.with("required", list(required));
    }
    object.rules.iter().fold(schema.with("additionalProperties", false), |schema, rule| schema.and(of_rule(rule)))
}

fn of_rule(rule: &Rule) -> Map {
    match rule {
        Rule::ExactlyOne(names) => {
            let only = |name: &&str| Map::new().with("required", list([*name]));
            Map::new().with("oneOf", list(names.iter().map(only)))
        }
        Rule::NotEmpty => Map::new().with("minProperties", 1_u32),
        Rule::Needs(name, other) => Map::new().with("dependencies", Map::new().with(name, list([*other]))),
        // The one is said where the field is described, the other cannot be said.
        Rule::Without(..) | Rule::NotBelow(..) => Map::new(),
    }
}

fn described(doc: &str, shape: &Shape) -> Map {
    Map::new().with("description", doc).and(of_shape(shape))
}

/// Items have no name, so they are described by what they are.
fn of_item(shape: &Shape) -> Map {
    match shape {
        Shape::Object(object) => described(object.doc, shape),
        _ => of_shape(shape),
    }
}

fn of_shape(shape: &Shape) -> Map {
    match shape {
        Shape::Text(text) => Map::new().with("type", "string").and(of_text(text)),
        Shape::Integer(range) => Map::new().with("type", "integer").and(of_range(*range)),
        Shape::IntegerOrText(range, text) => {
            Map::new().with("type", list(["integer", "string"])).and(of_range(*range)).and(of_text(text))
        }
        Shape::Keyword(words) => of_words(words),
        Shape::AnyCase(words) => {
            let pattern = Map::new().with("pattern", any_case(words));
            Map::new().with("anyOf", list([of_words(words), Map::new().with("type", "string").and(pattern)]))
        }
        Shape::List(items) => of_list(items),
        Shape::KeywordOrList(words, items) => Map::new().with("anyOf", list([of_words(words), of_list(items)])),
        Shape::Map(map) => {
            let (schema, keys) = (Map::new().with("type", "object"), of_text(map.keys));
            let schema = if keys.is_empty() { schema } else { schema.with("propertyNames", keys) };
            schema.with("additionalProperties", of_item(&map.values))
        }
        Shape::Object(inner) => object(inner),
        Shape::Opaque => Map::new(),
    }
}

pub fn of_words(words: &[&str]) -> Map {
    Map::new().with("type", "string").with("enum", list(words.iter().copied()))
}

pub fn of_text(text: &Text) -> Map {
    let mut schema = Map::new();
    if text.least > 0 {
        schema = schema.with("minLength", text.least);
    }
    if let Some(most) = text.most {
        schema = schema.with("maxLength", most);
    }
    text.pattern.into_iter().fold(schema, |schema, pattern| schema.with("pattern", pattern))
}

pub fn of_range(range: Range) -> Map {
    Map::new().with("minimum", range.low).with("maximum", range.high)
}

/// Without the limits of the Kubernetes API, which files do not have.
fn of_list(items: &List) -> Map {
    let mut schema = Map::new().with("type", "array");
    if items.least > 0 {
        schema = schema.with("minItems", items.least);
    }
    if items.distinct {
        schema = schema.with("uniqueItems", true);
    }
    schema.with("items", of_item(&items.items))
}

/// A pattern for these words in any case, and for empty text.
pub fn any_case(words: &[&str]) -> String {
    let letter = |c: char| {
        if c.is_ascii_alphabetic() {
            format!("[{}{}]", c.to_ascii_uppercase(), c.to_ascii_lowercase())
        } else {
            c.to_string()
        }
    };
    let word = |word: &&str| word.chars().map(letter).collect::<String>();
    format!("^({})?$", words.iter().map(word).collect::<Vec<_>>().join("|"))
}
