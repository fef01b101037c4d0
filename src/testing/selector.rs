//! Label and field selectors: parsing, and whether an object matches.
//!
//! Field selectors are looked up by path in any object; a real server knows a fixed list of fields per resource.

use serde_json::Value;

/// A parsed `labelSelector` and `fieldSelector`; the default one matches everything.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    /// Conditions on `metadata.labels`; all must hold.
    labels: Vec<LabelTerm>,
    /// Conditions on dotted paths; all must hold.
    fields: Vec<FieldTerm>,
}

/// One condition on one label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum LabelTerm {
    /// `key`
    Exists(String),
    /// `!key`
    Missing(String),
    /// `key=a`, `key in (a,b)`
    In(String, Vec<String>),
    /// `key!=a`, `key notin (a,b)`; an absent label satisfies it.
    NotIn(String, Vec<String>),
}

/// One condition on one field: path, value, and whether equality is wanted.
#[derive(Clone, Debug)]
struct FieldTerm {
    /// Dotted path such as `metadata.name`.
    path: String,
    /// The value compared with.
    value: String,
    /// False for `!=`.
    equal: bool,
}

impl Selector {
    /// Parses the two query parameters of a list or watch; the error is a message for a 400 answer.
    pub(super) fn parse(labels: &str, fields: &str) -> Result<Self, String> {
        Ok(Self {
            labels: split_terms(labels)
                .into_iter()
                .map(label_term)
                .collect::<Result<_, _>>()?,
            fields: split_terms(fields)
                .into_iter()
                .map(field_term)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Tells whether `object` satisfies every condition.
    pub(super) fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        self.labels.iter().all(|term| match term {
            LabelTerm::Exists(key) => label(key).is_some(),
            LabelTerm::Missing(key) => label(key).is_none(),
            LabelTerm::In(key, values) => label(key).is_some_and(|have| values.iter().any(|v| v == have)),
            LabelTerm::NotIn(key, values) => label(key).is_none_or(|have| values.iter().all(|v| v != have)),
        }) && self.fields.iter().all(|term| {
            let found = term.path.split('.').fold(object, |value, step| &value[step]);
            (found.as_str().unwrap_or_default() == term.value) == term.equal
        })
    }
}

/// Splits at commas that are not inside a `(a,b)` set.
fn split_terms(selector: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    selector
        .split(|c| {
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            c == ',' && depth == 0
        })
        .map(str::trim)
        .filter(|term| !term.is_empty())
        .collect()
}

fn label_term(term: &str) -> Result<LabelTerm, String> {
    if let Some(open) = term.find('(') {
        let set = term[open + 1..]
            .strip_suffix(')')
            .ok_or_else(|| format!("unable to parse requirement: found '{term}', expected: ')'"))?;
        let values = set.split(',').map(|value| value.trim().to_owned()).collect();
        let mut words = term[..open].split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => Ok(LabelTerm::In(key.to_owned(), values)),
            (Some(key), Some("notin"), None) => Ok(LabelTerm::NotIn(key.to_owned(), values)),
            _ => Err(format!(
                "unable to parse requirement: found '{term}', expected: in, notin"
            )),
        };
    }
    let one = |key: &str, value: &str| (key.trim().to_owned(), vec![value.trim().to_owned()]);
    if let Some((key, value)) = term.split_once("!=") {
        let (key, values) = one(key, value);
        return Ok(LabelTerm::NotIn(key, values));
    }
    if let Some((key, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
        let (key, values) = one(key, value);
        return Ok(LabelTerm::In(key, values));
    }
    match term.strip_prefix('!') {
        Some(key) => Ok(LabelTerm::Missing(key.trim().to_owned())),
        None if term.contains(char::is_whitespace) => Err(format!(
            "unable to parse requirement: found '{term}', expected: in, notin, =, ==, !="
        )),
        None => Ok(LabelTerm::Exists(term.to_owned())),
    }
}

fn field_term(term: &str) -> Result<FieldTerm, String> {
    let (path, value, equal) = if let Some((path, value)) = term.split_once("!=") {
        (path, value, false)
    } else if let Some((path, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
        (path, value, true)
    } else {
        return Err(format!("invalid selector: '{term}'; can't understand '{term}'"));
    };
    Ok(FieldTerm {
        path: path.to_owned(),
        value: value.to_owned(),
        equal,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_operator_of_a_label_selector_is_understood() {
        let pod = json!({"metadata": {"name": "web-1", "labels": {"app": "web", "tier": "a"}}});
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier in (a,b)", true),
            ("app=web, tier in (b, c)", false),
            ("tier notin (b)", true),
            ("zone notin (b)", true),
            ("app!=web", false),
            ("app", true),
            ("!app", false),
            ("!zone", true),
            ("zone", false),
        ] {
            let parsed = Selector::parse(selector, "").unwrap();
            assert_eq!(parsed.matches(&pod), expected, "{selector}");
        }
    }

    #[test]
    fn field_selectors_look_at_paths() {
        let pod = json!({"metadata": {"name": "web-1"}, "status": {"phase": "Running"}});
        let matches = |fields| Selector::parse("", fields).unwrap().matches(&pod);
        assert!(matches("metadata.name=web-1,status.phase==Running"));
        assert!(!matches("metadata.name!=web-1"));
    }

    #[test]
    fn broken_selectors_are_refused() {
        assert!(Selector::parse("app in (a", "").is_err());
        assert!(Selector::parse("app like (a)", "").is_err());
        assert!(Selector::parse("", "metadata.name").is_err());
    }
}
