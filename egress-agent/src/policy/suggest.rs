//! The known name that someone may have meant.

/// The nearest of `known`, if one is near: upper and lower case, `-` and `_` aside, at most a third of the letters
/// differ.
pub fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const LONGEST: usize = 64;
    if text.len() > LONGEST {
        return None;
    }
    let folded = fold(text);
    known
        .into_iter()
        .map(|name| (distance(&folded, &fold(name)), name))
        .filter(|(distance, name)| *distance <= name.len() / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// `did you mean …?`, or all there is to choose from.
pub fn choice(text: &str, known: &[&str]) -> String {
    match nearest(text, known.iter().copied()) {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!("one of {}", list(known)),
    }
}

/// "`a`, `b` or `c`".
pub fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

fn fold(text: &str) -> Vec<char> {
    text.chars().filter(|c| !"-_".contains(*c)).flat_map(char::to_lowercase).collect()
}

/// Edits (insert, delete, replace, swap of neighbours) between two words.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{choice, nearest};

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        let known = ["addresses", "hosts", "exportTo", "resolution"];
        assert_eq!(nearest("adresses", known), Some("addresses"));
        assert_eq!(nearest("export_to", known), Some("exportTo"));
        assert_eq!(nearest("hsots", known), Some("hosts"));
        assert_eq!(nearest("HOST", known), Some("hosts"));
        assert_eq!(nearest("weight", known), None);
        assert_eq!(nearest(&"h".repeat(1000), known), None);
        assert_eq!(choice("x", &["A", "B", "C"]), "one of `A`, `B` or `C`");
    }
}
