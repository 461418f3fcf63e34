//! `key=value` lists: one `--disk path=P,readonly=on`, or the same as a TOML table.

use super::Problems;

/// The keys of one device, taken out one by one.
#[derive(Clone, Debug, PartialEq)]
pub struct Fields {
    /// How messages call it: `disk 1`.
    place: String,
    entries: Vec<(String, String)>,
}

impl Fields {
    /// Reads `key=value,key=value`. A doubled comma stands for a comma in a value.
    pub fn parse(place: String, text: &str, problems: &mut Problems) -> Self {
        let mut fields = Fields { place, entries: Vec::new() };
        for item in split_at_single_commas(text) {
            match item.split_once('=') {
                Some((key, value)) => fields.put(key, value.to_owned(), problems),
                None => problems.add(format!("{}: '{item}' must be key=value", fields.place)),
            }
        }
        fields
    }

    /// Takes the keys of a TOML table; booleans read as `on` and `off`.
    pub fn from_table(place: String, table: &toml::Table, problems: &mut Problems) -> Self {
        let mut fields = Fields { place, entries: Vec::new() };
        for (key, value) in table {
            match scalar(value) {
                Some(value) => fields.put(key, value, problems),
                None => problems.add(format!("{}: `{key}` must be a text, a number, true or false", fields.place)),
            }
        }
        fields
    }

    fn put(&mut self, key: &str, value: String, problems: &mut Problems) {
        if self.entries.iter().any(|(known, _)| known == key) {
            problems.add(format!("{}: `{key}` is given twice", self.place));
        }
        self.entries.push((key.to_owned(), value));
    }

    /// The value of `key`, if it was given.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let index = self.entries.iter().position(|(known, _)| known == key)?;
        Some(self.entries.remove(index).1)
    }

    /// The value of a switch, `default` if it was not given.
    pub fn take_switch(&mut self, key: &str, default: bool, problems: &mut Problems) -> bool {
        match self.take(key).as_deref() {
            None => default,
            Some("on" | "true") => true,
            Some("off" | "false") => false,
            Some(other) => {
                problems.add(format!("{}: `{key}` must be on or off, not '{other}'", self.place));
                default
            }
        }
    }

    /// Names every key that nothing has taken; `known` are those that there are.
    pub fn finish(self, known: &[&str], problems: &mut Problems) {
        for (key, _) in &self.entries {
            if !known.contains(&key.as_str()) {
                problems.add(format!("{}: {}", self.place, unknown_key(key, known)));
            }
        }
    }
}

/// What to say of a key that does not exist.
pub fn unknown_key(key: &str, known: &[&str]) -> String {
    let similarity = |candidate: &&&str| (strsim::jaro_winkler(key, candidate) * 1000.0) as u32;
    match known.iter().max_by_key(similarity).filter(|nearest| similarity(nearest) > 700) {
        Some(nearest) => format!("unknown key `{key}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{key}`; there are {}", known.join(", ")),
    }
}

/// A TOML value as the command line would have it.
pub fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(switch) => Some(if *switch { "on" } else { "off" }.to_owned()),
        toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => None,
    }
}

/// The items between commas, with doubled commas made single.
fn split_at_single_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let doubled = character == ',' && characters.next_if_eq(&',').is_some();
        match items.last_mut() {
            Some(item) if character != ',' || doubled => item.push(character),
            _ => items.push(String::new()),
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (Fields, Problems) {
        let mut problems = Problems::default();
        let fields = Fields::parse("disk 1".into(), text, &mut problems);
        (fields, problems)
    }

    #[test]
    fn keys_are_taken_once() {
        let (mut fields, problems) = parse("path=/a=b,,c,readonly=on");
        assert_eq!(problems, Problems::default());
        assert_eq!(fields.take("path").as_deref(), Some("/a=b,c"));
        assert_eq!(fields.take("path"), None);
        assert!(fields.take_switch("readonly", false, &mut Problems::default()));
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let (mut fields, mut problems) = parse("path=a,path=b,direct=maybe,redonly=on,zzz=1,plain");
        fields.take("path");
        assert!(fields.take_switch("direct", true, &mut problems));
        fields.finish(&["path", "readonly", "direct"], &mut problems);
        assert_eq!(
            problems.list(),
            [
                "disk 1: `path` is given twice",
                "disk 1: 'plain' must be key=value",
                "disk 1: `direct` must be on or off, not 'maybe'",
                "disk 1: unknown key `redonly`; did you mean `readonly`?",
                "disk 1: unknown key `zzz`; there are path, readonly, direct",
            ]
        );
    }
}
