//! Text of others, made harmless: the one place that says how names, arguments and messages are shown, whatever the outlet.
//!
//! What a terminal would obey or hide, or what would turn the text around it, becomes visible: `\u{…}` for characters, `\xNN`
//! for bytes that are not UTF-8. A backslash stays as it is, since names of systemd units have some.

use std::{borrow::Cow, ffi::OsStr, io, os::unix::ffi::OsStrExt as _};

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter};

/// The text with everything a terminal would obey or hide written as `\u{…}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(is_treacherous) {
        Cow::Owned(shown(text.as_bytes(), usize::MAX).0)
    } else {
        Cow::Borrowed(text)
    }
}

/// The same of bytes that may be no text: of a name of a file, or of what the kernel tells.
pub fn printable_bytes(bytes: &(impl AsRef<OsStr> + ?Sized)) -> String {
    shown(bytes.as_ref().as_bytes(), usize::MAX).0
}

/// The same of the first of them, that take at most so many bytes within a string of JSON; whether that is all of them.
pub fn shown(bytes: &[u8], most: usize) -> (String, bool) {
    let mut out = Bounded { text: String::new(), left: most };
    for chunk in bytes.utf8_chunks() {
        let is_whole =
            chunk.valid().chars().all(|c| out.push(c)) && chunk.invalid().iter().all(|&byte| out.push_byte(byte));
        if !is_whole {
            return (out.text, false);
        }
    }
    (out.text, true)
}

/// A value as part of a line of `name=value`: in quotes where it could pose as more than that.
pub fn value(text: &str) -> Cow<'_, str> {
    let is_plain = |c: char| !c.is_whitespace() && !matches!(c, '"' | '\'' | '=' | '`');
    if !text.is_empty() && text.chars().all(is_plain) { Cow::Borrowed(text) } else { Cow::Owned(quoted(text)) }
}

/// A quote within quotes.
const QUOTE: &str = "\\u{22}";

/// A value in quotes, in which no quote can end it.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', QUOTE))
}

/// Writes JSON that is harmless also to whoever prints its strings as they are (`jq -r`). The ends of lines stay, since some
/// strings are documents; who has names in a string shows them by [`printable`] first.
pub fn to_json(out: impl io::Write, value: &impl Serialize) -> serde_json::Result<()> {
    value.serialize(&mut serde_json::Serializer::with_formatter(out, Harmless))
}

struct Harmless;

impl Formatter for Harmless {
    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        match printable(fragment) {
            Cow::Borrowed(harmless) => out.write_all(harmless.as_bytes()),
            // The backslashes are ours alone: those of the string are told by the other function.
            Cow::Owned(shown) => out.write_all(shown.replace('\\', "\\\\").as_bytes()),
        }
    }

    fn write_char_escape<W: io::Write + ?Sized>(&mut self, out: &mut W, escape: CharEscape) -> io::Result<()> {
        let byte = match escape {
            CharEscape::Quote => return out.write_all(b"\\\""),
            CharEscape::ReverseSolidus => return out.write_all(b"\\\\"),
            CharEscape::Solidus => return out.write_all(b"/"),
            CharEscape::LineFeed => return out.write_all(b"\\n"),
            CharEscape::Backspace => 0x08,
            CharEscape::FormFeed => 0x0c,
            CharEscape::CarriageReturn => b'\r',
            CharEscape::Tab => b'\t',
            CharEscape::AsciiControl(byte) => byte,
        };
        write!(out, "\\\\u{{{byte:x}}}")
    }
}

/// Text that takes no more than so many bytes within a string of JSON.
struct Bounded {
    text: String,
    left: usize,
}

impl Bounded {
    /// Whether there was room for it, as it is shown.
    fn push(&mut self, c: char) -> bool {
        if is_treacherous(c) {
            return self.add(&c.escape_unicode().to_string());
        }
        self.add(c.encode_utf8(&mut [0; 4]))
    }

    fn push_byte(&mut self, byte: u8) -> bool {
        self.add(&format!("\\x{byte:02x}"))
    }

    fn add(&mut self, text: &str) -> bool {
        let Some(left) = self.left.checked_sub(size(text)) else { return false };
        self.left = left;
        self.text.push_str(text);
        true
    }
}

/// The most bytes that text which is shown takes within a string of JSON, or in quotes.
pub fn size(shown: &str) -> usize {
    let more = |byte| match byte {
        b'"' => QUOTE.len() - 1,
        b'\\' => 1,
        _ => 0,
    };
    shown.len() + shown.bytes().map(more).sum::<usize>()
}

/// Control characters, and those that reorder or hide the text around them, or take no room themselves.
pub fn is_treacherous(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}' | '\u{891}'
        )
        || matches!(c, '\u{8e2}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}')
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}')
        || matches!(c, '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}')
        || matches!(c, '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}')
        || matches!(c, '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a hostile name may hold: colours and a bell, lines, DEL, C1, text turned around, and what is not seen.
    const HOSTILE: &str = "\u{1b}[31m\u{7}\n\r\t\u{7f}\u{9b}31m\u{202e}\u{2028}\u{200b}\u{feff}\u{e0041}";

    #[test]
    fn what_a_terminal_obeys_or_hides_is_shown() {
        let shown = printable(HOSTILE);
        assert!(!shown.chars().any(is_treacherous), "{shown}");
        assert!(shown.starts_with("\\u{1b}[31m\\u{7}\\u{a}\\u{d}\\u{9}\\u{7f}\\u{9b}31m\\u{202e}\\u{2028}"), "{shown}");
        assert_eq!(printable("dev-disk-by\\x2dlabel.mount café 日本"), "dev-disk-by\\x2dlabel.mount café 日本");
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_as_numbers() {
        assert_eq!(printable_bytes(OsStr::from_bytes(b"a\xff\xc3b\x1b")), "a\\xff\\xc3b\\u{1b}");
    }

    #[test]
    fn a_value_cannot_pose_as_another_field() {
        assert_eq!(value("/system.slice/a\\x2db.service"), "/system.slice/a\\x2db.service");
        assert_eq!(value("/a uid=0"), "\"/a uid=0\"");
        assert_eq!(value("a\" uid=0 b=\""), "\"a\\u{22} uid=0 b=\\u{22}\"");
        assert_eq!((value(""), value("a=b")), ("\"\"".into(), "\"a=b\"".into()));
    }

    #[test]
    fn json_is_harmless_to_who_prints_its_strings() {
        let mut json = Vec::new();
        to_json(&mut json, &[HOSTILE, "a\\\"/\n"]).unwrap();
        let read: Vec<String> = serde_json::from_slice(&json).unwrap();
        assert_eq!(read, [printable(HOSTILE).replace("\\u{a}", "\n"), "a\\\"/\n".to_owned()]);
        assert!(!std::str::from_utf8(&json).unwrap().chars().any(is_treacherous));
    }

    proptest! {
        #[test]
        fn nothing_that_is_shown_is_treacherous_or_larger_than_it_may_be(bytes: Vec<u8>, most in 0..200_usize) {
            let (text, is_whole) = shown(&bytes, most);
            prop_assert!(!text.chars().any(is_treacherous));
            prop_assert!(serde_json::to_string(&text).unwrap().len() <= most + 2);
            let (all, _) = shown(&bytes, usize::MAX);
            prop_assert!(all.starts_with(&text) && is_whole == (all == text));
            prop_assert_eq!(printable_bytes(OsStr::from_bytes(&bytes)), all);
        }
    }
}
