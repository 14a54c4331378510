//! `metadata`, the same in both kinds.

use super::{ANY_TEXT, Field, Map, NAMESPACE, OBJECT_NAME, Object, Shape, object, optional, required};

/// `metadata`. What Kubernetes writes there for itself is accepted and not read.
pub static METADATA: Object = object(
    "What identifies the document.",
    &[
        required(
            "name",
            Shape::Text(&OBJECT_NAME),
            "The document's name, unique for its kind and namespace. Verdicts, logs and metrics name a rule by it.",
        ),
        optional("namespace", Shape::Text(&NAMESPACE), "The document's namespace. Default: `default`."),
        optional("labels", Shape::Map(&TEXTS), "Labels of the document."),
        optional("annotations", Shape::Map(&TEXTS), "Notes on the document."),
        kubernetes("generateName"),
        kubernetes("creationTimestamp"),
        kubernetes("deletionTimestamp"),
        kubernetes("deletionGracePeriodSeconds"),
        kubernetes("resourceVersion"),
        kubernetes("uid"),
        kubernetes("generation"),
        kubernetes("managedFields"),
        kubernetes("ownerReferences"),
        kubernetes("finalizers"),
        kubernetes("selfLink"),
        kubernetes("clusterName"),
    ],
);

const fn kubernetes(name: &'static str) -> Field {
    optional(name, Shape::Opaque, "Of Kubernetes; not read.")
}

static TEXTS: Map = Map { keys: &ANY_TEXT, values: Shape::Text(&ANY_TEXT), api_limit: 4096 };
