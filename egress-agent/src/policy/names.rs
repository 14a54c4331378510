//! Names: DNS, Kubernetes objects, labels. What is allowed is what Istio and Kubernetes allow.

use std::net::IpAddr;

use super::{HostPattern, diagnostic::quoted};

/// A DNS label as Istio checks it: letters of either case, digits and inner `-`, at most 63.
pub fn is_dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inner = bytes.iter().all(|&b| b.is_ascii_alphanumeric() || b == b'-');
    let ends = bytes.first().zip(bytes.last()).is_some_and(|(a, z)| *a != b'-' && *z != b'-');
    text.len() <= 63 && inner && ends
}

/// A Kubernetes namespace: a DNS label in lower case.
pub fn is_namespace(text: &str) -> bool {
    is_dns_label(text) && !text.bytes().any(|b| b.is_ascii_uppercase())
}

/// A Kubernetes object's name: labels in lower case, joined by dots, at most 253 characters.
pub fn is_object_name(text: &str) -> bool {
    let part = |label: &str| {
        let bytes = label.as_bytes();
        let ends = bytes.first().zip(bytes.last()).is_some_and(|(a, z)| *a != b'-' && *z != b'-');
        ends && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
    };
    text.len() <= 253 && text.split('.').all(part)
}

/// A label's key: `app`, `example.com/app`.
pub fn is_label_key(text: &str) -> bool {
    let (prefix, name) = text.rsplit_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    let prefix_fits = prefix.is_none_or(|prefix| prefix.len() <= 253 && prefix.split('.').all(is_dns_label));
    prefix_fits && !name.is_empty() && is_label_value(name)
}

/// A label's value: empty, or at most 63 letters, digits, `-`, `_` and `.`, starting and ending with a letter or digit.
pub fn is_label_value(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends =
        bytes.first().zip(bytes.last()).is_none_or(|(a, z)| a.is_ascii_alphanumeric() && z.is_ascii_alphanumeric());
    text.len() <= 63 && ends && bytes.iter().all(|&b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Why a text is not a host: what is wrong, and what to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadHost {
    /// What is wrong.
    pub message: String,
    /// What to write.
    pub help: String,
}

fn bad(message: impl Into<String>, help: impl Into<String>) -> BadHost {
    BadHost { message: message.into(), help: help.into() }
}

/// A host of a `ServiceEntry`: a name, or a wildcard in its first label.
pub fn host_pattern(text: &str) -> Result<HostPattern, BadHost> {
    if matches!(text, "*" | "*.") {
        return Err(bad("the host `*` would be every name there is", "name the hosts, as `*.example.com`"));
    }
    let Some(rest) = text.strip_prefix('*') else { return fqdn_in(text, true).map(HostPattern::Exact) };
    length_fits(text)?;
    match rest.strip_prefix('.') {
        Some(suffix) => fqdn_in(suffix, false).map(HostPattern::Below),
        None => partial(rest).map(HostPattern::Ending),
    }
}

/// `*bar.com` and `*-bar.com`, without the star.
fn partial(rest: &str) -> Result<String, BadHost> {
    let (first, more) = rest.split_once('.').map_or((rest, None), |(first, more)| (first, Some(more)));
    let label = first.strip_prefix('-').unwrap_or(first);
    if !is_dns_label(label) || first.len() > 62 {
        return Err(bad_label(&format!("*{first}")));
    }
    if let Some(more) = more {
        fqdn_in(more, false)?;
    }
    Ok(normal(rest))
}

/// A full name, in lower case and without its trailing dot.
pub fn fqdn(text: &str) -> Result<String, BadHost> {
    if text.starts_with('*') {
        return Err(bad(format!("{} is a wildcard", quoted(text)), "write one full name"));
    }
    fqdn_in(text, false)
}

/// `lone_number`: Istio takes a single label of digits for a host in `hosts`, and nowhere else.
fn fqdn_in(text: &str, lone_number: bool) -> Result<String, BadHost> {
    length_fits(text)?;
    if text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok() {
        return Err(bad(
            format!("{} is an IP address, not a host name", quoted(text)),
            "addresses have a field of their own",
        ));
    }
    let labels: Vec<&str> = text.strip_suffix('.').unwrap_or(text).split('.').collect();
    if let Some(label) = labels.iter().find(|label| !is_dns_label(label)) {
        return Err(bad_label(label));
    }
    let numeric = labels.last().is_some_and(|top| top.bytes().all(|b| b.is_ascii_digit()));
    if numeric && !(lone_number && labels.len() == 1) {
        let help = "no top level domain consists of digits; addresses have a field of their own";
        return Err(bad(format!("{} ends in a number", quoted(text)), help));
    }
    Ok(normal(text))
}

fn length_fits(text: &str) -> Result<(), BadHost> {
    match text.len() {
        0 => Err(bad("the host name is empty", "write a name, as `db.example.com`")),
        1..=255 => Ok(()),
        long => Err(bad(format!("the host name has {long} characters"), "DNS names have at most 255")),
    }
}

fn bad_label(label: &str) -> BadHost {
    let help = match label {
        "" => "between two dots stands a name",
        _ if label.contains('*') => "`*` may only be the whole first label, as in `*.example.com`",
        _ if label.contains("://") || label.contains('/') => "write the host alone, without scheme and path",
        _ if label.contains(':') => "write the host alone; ports have a field of their own",
        _ if !label.is_ascii() => "write international names in their `xn--` form",
        _ if label.len() > 63 => "the parts of a DNS name have at most 63 characters",
        _ => "the parts of a host name are letters, digits and inner `-`",
    };
    bad(format!("{} cannot be part of a host name", quoted(label)), help)
}

fn normal(text: &str) -> String {
    text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_as_istio_reads_them() {
        let exact = |name: &str| Ok(HostPattern::Exact(name.to_owned()));
        assert_eq!(host_pattern("DB.Example.com."), exact("db.example.com"));
        assert_eq!(host_pattern("localhost"), exact("localhost"));
        assert_eq!(host_pattern("123"), exact("123"));
        assert_eq!(host_pattern("*.Example.com"), Ok(HostPattern::Below("example.com".to_owned())));
        assert_eq!(host_pattern("*.com"), Ok(HostPattern::Below("com".to_owned())));
        assert_eq!(host_pattern("*bar.com"), Ok(HostPattern::Ending("bar.com".to_owned())));
        assert_eq!(host_pattern("*-bar.com"), Ok(HostPattern::Ending("-bar.com".to_owned())));
        for text in
            ["", "*", "*.", ".", "a..b", "-a.com", "a-.com", "a_b.com", "a.*.com", "*.*.com", "f*.com", "**.com"]
        {
            assert!(host_pattern(text).is_err(), "{text}");
        }
        for text in ["1.2.3.4", "::1", "[::1]", "a.1", "*.1", "münchen.de", "http://a.com", "a.com:80", "*--a.com"] {
            assert!(host_pattern(text).is_err(), "{text}");
        }
        assert!(host_pattern(&format!("{}com", "a.".repeat(127))).is_err());
        assert!(host_pattern(&format!("{}.com", "a".repeat(64))).is_err());
        assert!(fqdn("123").is_err() && fqdn("*.a").is_err() && fqdn("a").is_ok());
    }

    #[test]
    fn object_names_are_those_of_kubernetes() {
        for name in ["a", "a-b", "a.b", "0", "mysql-external.v2"] {
            assert!(is_object_name(name), "{name}");
        }
        for name in ["", "-a", "a-", "A", "a..b", "a_b", ".a", "a/b", &"a".repeat(254)] {
            assert!(!is_object_name(name), "{name}");
        }
        assert!(is_namespace("shop-1") && !is_namespace("a.b") && !is_namespace("Shop"));
    }

    #[test]
    fn labels_are_those_of_kubernetes() {
        for key in ["app", "app.kubernetes.io/name", "a_B.c-1", "A.b/c"] {
            assert!(is_label_key(key), "{key}");
        }
        for key in ["", "/a", "a/", "a//b", "-a", "a b", "*", "a_b/c"] {
            assert!(!is_label_key(key), "{key}");
        }
        assert!(is_label_value("") && is_label_value("v1.2_x") && !is_label_value("-") && !is_label_value("a b"));
    }
}
