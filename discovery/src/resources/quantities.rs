//! Values as Kubernetes and Go write them, in what is imported.

use serde_json::Value as Json;

use super::Span;
use super::values::span_of;
use crate::yaml::printable;

/// The Gateway API's own limit.
const MOST_WEIGHT: f64 = 1_000_000.0;

/// Quantities of Kubernetes (`1`, `0.5`, `500m`, `1k`) as whole weights: in thousandths, if they are not whole.
pub(super) fn weights_of(weights: &[Json]) -> Option<Vec<u32>> {
    let thousandths: Vec<f64> = weights.iter().map(thousandths).collect::<Option<_>>()?;
    let whole = thousandths.iter().all(|weight| weight % 1000.0 == 0.0);
    let unit = if whole { 1000.0 } else { 1.0 };
    let weight = |weight: &f64| (0.0..=MOST_WEIGHT).contains(&(weight / unit)).then(|| (weight / unit).round() as u32);
    thousandths.iter().map(weight).collect()
}

fn thousandths(weight: &Json) -> Option<f64> {
    let number = match weight {
        Json::Number(number) => number.as_f64()?,
        Json::String(text) => quantity(text)?,
        _ => return None,
    };
    let thousandths = (number * 1000.0).round();
    // What is so little that it would be none is not what was meant.
    (number == 0.0 || thousandths > 0.0).then_some(thousandths)
}

fn quantity(text: &str) -> Option<f64> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let binary = |power: i32| 1024_f64.powi(power);
    let factor = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        exponent => 10_f64.powi(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    Some(number.parse::<f64>().ok()? * factor).filter(|value| value.is_finite())
}

/// A duration as Go reads it (`1.5s`, `1h30m`, `100us`), in whole milliseconds, of which there is one at least of what is not
/// nothing.
pub(super) fn go_duration(text: &str) -> Result<Span, String> {
    let wrong = || format!("`{}` is not a duration; write it like 1m30s, 1.5s or 250ms", printable(text));
    let (mut rest, mut millis) = (text, 0.0);
    if text.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() && text != "0" {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(wrong)?;
        let number: f64 = rest[..end].parse().map_err(|_| wrong())?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ns" => 1e-6,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e-3,
            "ms" => 1.0,
            "s" => 1e3,
            "m" => 60e3,
            "h" => 3600e3,
            _ => return Err(wrong()),
        };
        rest = &rest[end..];
        millis += number * unit;
    }
    // What ten digits behind the point are is not written.
    let span = Span::from_millis((millis - 1e-9).max(0.0).ceil() as u64);
    span_of(&span.to_string()).map(|_| span).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn weights_are_quantities_of_kubernetes() {
        let of = |weights: Json| weights_of(weights.as_array().unwrap());
        assert_eq!(of(json!([1, "2", "1k", "3e2", "1Ki"])), Some(vec![1, 2, 1000, 300, 1024]));
        assert_eq!(of(json!(["500m", 0.5, "0.29", "1500000u", 0])), Some(vec![500, 500, 290, 1500, 0]));
        for wrong in ["", "x", "-1", "1kk", "1e3m", "1e", "1E", "1n", "2M", "1e400", "."] {
            assert_eq!(of(json!([wrong])), None, "{wrong}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        for (text, millis) in [
            ("0", 0),
            ("0s", 0),
            ("1.5s", 1500),
            ("100us", 1),
            ("1h30m", 5_400_000),
            ("2m0.25s", 120_250),
            ("300ms", 300),
        ] {
            assert_eq!(go_duration(text), Ok(Span::from_millis(millis)), "{text}");
        }
        for text in ["", "1", "1d", "-1s", "s", "1..5s", ".s", "1 s", "100000h", "99999999999999999999h"] {
            assert!(go_duration(text).is_err(), "{text}");
        }
    }
}
