//! What a scalar would be to the readers of YAML that are in use.

use std::borrow::Cow;

/// A value without parts, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scalar<'t> {
    /// The text, without quotes, escapes resolved.
    pub text: Cow<'t, str>,
    /// Whether it was written without quotes, so that it may be something else than text.
    pub plain: bool,
}

/// The type of a scalar. It follows YAML 1.1 where that differs from 1.2, since Kubernetes and Istio do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScalarKind {
    /// `null`, `~`, nothing.
    Null,
    /// `true`, `yes`, `on`, `y` and their opposites, in three capitalisations.
    Bool,
    /// A decimal integer.
    Integer,
    /// Every other number: octal, hexadecimal, binary, with `_`, with a fraction or an exponent.
    OddNumber,
    /// Text.
    Text,
}

impl Scalar<'_> {
    /// The type of the scalar.
    pub fn kind(&self) -> ScalarKind {
        if !self.plain {
            return ScalarKind::Text;
        }
        match &*self.text {
            "" | "~" | "null" | "Null" | "NULL" => ScalarKind::Null,
            text if is_bool(text) => ScalarKind::Bool,
            text if is_integer(text) => ScalarKind::Integer,
            text if is_odd_number(text) => ScalarKind::OddNumber,
            _ => ScalarKind::Text,
        }
    }
}

fn is_bool(text: &str) -> bool {
    const WORDS: [&str; 8] = ["true", "false", "yes", "no", "on", "off", "y", "n"];
    let rest = text.get(1..).unwrap_or_default();
    let one_case = rest.bytes().all(|b| b.is_ascii_lowercase()) || text.bytes().all(|b| b.is_ascii_uppercase());
    text.len() <= 5 && one_case && WORDS.iter().any(|word| word.eq_ignore_ascii_case(text))
}

fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let leading_zero = digits.len() > 1 && digits.starts_with('0');
    !digits.is_empty() && !leading_zero && digits.bytes().all(|b| b.is_ascii_digit())
}

fn is_odd_number(text: &str) -> bool {
    let number = text.strip_prefix(['-', '+']).unwrap_or(text).to_ascii_lowercase();
    let based = |prefix: &str, radix: u32| {
        number.strip_prefix(prefix).is_some_and(|digits| {
            digits.starts_with(|c: char| c.is_digit(radix)) && digits.chars().all(|c| c == '_' || c.is_digit(radix))
        })
    };
    matches!(&*number, ".inf" | ".nan") || based("0x", 16) || based("0o", 8) || based("0b", 2) || is_float(&number)
}

/// Digits with `_`, at most one `.`, an optional exponent.
fn is_float(number: &str) -> bool {
    let (mantissa, exponent) = number.split_once('e').map_or((number, None), |(m, e)| (m, Some(e)));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || b == b'_');
    let starts_right = number.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    let exponent = exponent.is_none_or(|e| {
        let e = e.strip_prefix(['-', '+']).unwrap_or(e);
        !e.is_empty() && e.bytes().all(|b| b.is_ascii_digit())
    });
    let any_digit = whole.bytes().chain(fraction.bytes()).any(|b| b.is_ascii_digit());
    starts_right && any_digit && digits(whole) && digits(fraction) && exponent
}

#[cfg(test)]
mod tests {
    use super::{Scalar, ScalarKind};

    fn check(kind: ScalarKind, texts: &[&'static str]) {
        for &text in texts {
            assert_eq!(Scalar { text: text.into(), plain: true }.kind(), kind, "{text:?}");
            assert_eq!(Scalar { text: text.into(), plain: false }.kind(), ScalarKind::Text, "{text:?} in quotes");
        }
    }

    #[test]
    fn plain_scalars_are_what_yaml_1_1_makes_of_them() {
        check(ScalarKind::Null, &["", "~", "null", "NULL"]);
        check(ScalarKind::Bool, &["yes", "On", "OFF", "y", "N", "true", "FALSE"]);
        check(ScalarKind::Integer, &["0", "-1", "+3306", "4294967296"]);
        check(
            ScalarKind::OddNumber,
            &["0777", "00", "0x50", "0b11", "0o123", "3_306", "33e2", "80.0", "1.", ".5", ".inf", "-.NaN"],
        );
        check(
            ScalarKind::Text,
            &["yEs", "yess", "1.2.3.4", "::1", "0x", "e5", ".", "_1", "1e", "10.0.0.0/8", "-", "+", "é"],
        );
    }
}
