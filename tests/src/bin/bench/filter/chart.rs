//! Bars with error bars, as SVG that is read on light and on dark ground.

use std::fmt::Write as _;

use crate::estimate::Estimate;

/// One bar.
#[derive(Debug)]
pub struct Bar {
    pub name: &'static str,
    pub value: Estimate,
    /// Whether it is what the others are there to be compared with.
    pub ours: bool,
}

const WIDTH: f64 = 720.0;
/// Where bars begin: the names are before it.
const LEFT: f64 = 150.0;
/// Where the longest ends, with its error: its number is after it.
const RIGHT: f64 = WIDTH - 110.0;
const TOP: f64 = 40.0;
const STEP: f64 = 26.0;
const HEIGHT: f64 = 16.0;

/// The picture.
pub fn svg(title: &str, bars: &[Bar]) -> String {
    let longest = bars.iter().map(|bar| bar.value.mean + bar.value.ci95).fold(1.0, f64::max);
    let x = |value: f64| LEFT + (RIGHT - LEFT) * value.max(0.0) / longest;
    let height = TOP + STEP * bars.len() as f64 + 10.0;
    let mut text = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">
<style>
text {{ fill: #24292f }} .title {{ font-weight: bold }} .value {{ font-size: 12px }}
.other {{ fill: #8c959f }} .ours {{ fill: #0969da }} line {{ stroke: #24292f; stroke-width: 1.2 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .other {{ fill: #6e7681 }} .ours {{ fill: #58a6ff }} line {{ stroke: #e6edf3 }}
}}
</style>
<text class="title" x="10" y="22">{title}</text>
"#
    );
    for (place, bar) in bars.iter().enumerate() {
        let Estimate { mean, ci95 } = bar.value;
        let y = TOP + STEP * place as f64;
        let middle = y + HEIGHT / 2.0;
        let (low, high) = (x(mean - ci95), x(mean + ci95));
        let class = if bar.ours { "ours" } else { "other" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>
<rect class="{class}" x="{LEFT}" y="{y:.1}" width="{:.1}" height="{HEIGHT}"/>
<line x1="{low:.1}" y1="{middle:.1}" x2="{high:.1}" y2="{middle:.1}"/>
<line x1="{low:.1}" y1="{:.1}" x2="{low:.1}" y2="{:.1}"/><line x1="{high:.1}" y1="{:.1}" x2="{high:.1}" y2="{:.1}"/>
<text class="value" x="{:.1}" y="{:.1}">{mean:.1} ± {ci95:.1}</text>"#,
            LEFT - 8.0,
            middle + 4.5,
            bar.name,
            x(mean) - LEFT,
            middle - 3.0,
            middle + 3.0,
            middle - 3.0,
            middle + 3.0,
            high + 6.0,
            middle + 4.0,
        );
    }
    text + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bar_is_there_as_long_as_its_value_and_none_goes_beyond_the_edge() {
        let of = |name, mean, ours| Bar { name, value: Estimate { mean, ci95: 1.0 }, ours };
        let text = svg("title", &[of("a", 49.0, false), of("b", 24.5, true), of("none", -0.5, false)]);
        let width = |place: usize| -> f64 {
            let rect = text.split("<rect ").nth(place + 1).expect("a bar");
            let width = rect.split("width=\"").nth(1).and_then(|rest| rest.split('"').next());
            width.and_then(|width| width.parse().ok()).expect("a width")
        };
        // Numbers are written to a tenth.
        assert!((width(0) - 2.0 * width(1)).abs() < 0.3, "{text}");
        assert!(width(0) > 400.0 && width(0) + LEFT < RIGHT && width(2) == 0.0, "{text}");
        assert_eq!(text.matches("class=\"ours\"").count(), 1);
        assert!(text.contains("<text class=\"value\"") && !text.contains("NaN"));
    }
}
