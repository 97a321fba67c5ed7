//! Host ids out of what was proved: `web-{cn}`.

/// Longest host id made this way: names of hosts are shown in tables.
const LONGEST: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Value(&'static str),
}

impl Template {
    pub(super) fn parse(text: &str, names: &[&'static str]) -> Result<Template, String> {
        let listed = || names.iter().map(|name| format!("{{{name}}}")).collect::<Vec<_>>().join(", ");
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, behind) =
                after.split_once('}').ok_or_else(|| format!("host = \"{text}\": a `{{` stays open"))?;
            let known = names.iter().find(|known| **known == name);
            let known = known.ok_or_else(|| format!("host = \"{text}\": `{{{name}}}` is none of {}", listed()))?;
            parts.extend([Part::Text(before.to_owned()), Part::Value(known)]);
            rest = behind;
        }
        if !parts.iter().any(|part| matches!(part, Part::Value(_))) {
            let why = "everybody would be the same host";
            return Err(format!("host = \"{text}\": {why}; use one of {}", listed()));
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Template(parts))
    }

    /// Names what it needs and `value` does not know, or cannot stand in a host id.
    pub(super) fn fill(&self, value: impl Fn(&str) -> Option<String>) -> Result<String, String> {
        let mut id = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => id.push_str(text),
                Part::Value(name) => {
                    let value = value(name).filter(|value| !value.is_empty());
                    let value = value.ok_or_else(|| format!("it has no `{name}`, of which its host id is made"))?;
                    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
                    if !value.bytes().all(is_allowed) {
                        return Err(format!(
                            "its `{name}` is `{}`, which cannot be in a host id",
                            value.escape_debug()
                        ));
                    }
                    id.push_str(&value);
                }
            }
        }
        if id.len() > LONGEST {
            return Err(format!("its host id would have {} bytes; {LONGEST} are allowed", id.len()));
        }
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 2] = ["cn", "dns"];

    fn fill(text: &str, cn: &str) -> Result<String, String> {
        Template::parse(text, &NAMES).unwrap().fill(|name| (name == "cn").then(|| cn.to_owned()))
    }

    #[test]
    fn values_stand_where_their_names_are() {
        assert_eq!(fill("m-{cn}.x", "web").unwrap(), "m-web.x");
        assert_eq!(fill("{cn}-{cn}", "a").unwrap(), "a-a");
    }

    #[test]
    fn what_is_missing_or_cannot_be_in_an_id_is_named() {
        assert!(fill("{dns}", "web").unwrap_err().contains("no `dns`"));
        assert!(fill("{cn}", "").unwrap_err().contains("no `cn`"));
        for value in ["a b", "../x", "a/sa/b", "é"] {
            assert!(fill("{cn}", value).unwrap_err().contains("cannot be in a host id"), "{value}");
        }
        assert!(fill("{cn}", &"a".repeat(129)).unwrap_err().contains("129 bytes"));
    }

    #[test]
    fn a_template_that_cannot_tell_hosts_apart_is_refused() {
        for (text, expected) in [("web", "{cn}, {dns}"), ("{x}", "none of"), ("{cn", "stays open")] {
            let error = Template::parse(text, &NAMES).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
