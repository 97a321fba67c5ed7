//! A scrape of Prometheus text, asked by name and labels.

use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    pub fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter(|line| !line.starts_with('#')).filter_map(parse_line).collect() }
    }

    /// The sum over every series of `name` that has these labels; 0 when there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }

    pub fn has(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.matching(name, labels).next().is_some()
    }

    fn matching(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name
                && labels.iter().all(|(label, value)| sample.labels.get(*label).is_some_and(|found| found == value))
        })
    }
}

fn parse_line(line: &str) -> Option<Sample> {
    let (series, value) = match line.rfind('}') {
        Some(end) => (&line[..=end], line[end + 1..].split_whitespace().next()?),
        None => line.split_once(' ')?,
    };
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, parse_labels(labels.strip_suffix('}')?)),
        None => (series, BTreeMap::new()),
    };
    Some(Sample { name: name.to_owned(), labels, value: value.trim().parse().ok()? })
}

fn parse_labels(mut text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    while let Some((name, rest)) = text.split_once("=\"") {
        let Some((value, after)) = quoted(rest) else { break };
        labels.insert(name.trim_start_matches(',').trim().to_owned(), value);
        text = after;
    }
    labels
}

/// A label value up to its closing quote, unescaped, and what follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match characters.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_the_series_that_match() {
        let metrics = Metrics::parse(
            "# TYPE x_total counter\nx_total{a=\"1\",b=\"in, \\\"out\\\" {}\"} 2\nx_total{a=\"2\"} 3.5\nplain 7\n# EOF\n",
        );
        assert!((metrics.sum("x_total", &[]) - 5.5).abs() < f64::EPSILON);
        assert!((metrics.sum("x_total", &[("b", "in, \"out\" {}")]) - 2.0).abs() < f64::EPSILON);
        assert!((metrics.sum("plain", &[]) - 7.0).abs() < f64::EPSILON);
        assert!(!metrics.has("x_total", &[("a", "3")]));
    }
}
