//! A Prometheus of a test's own, with the configuration and the rules that are shipped.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::http::{self, Request};
use crate::ports::Port;
use crate::process::Process;
use crate::wait::wait_until;
use crate::{SOON, binaries};

/// How often it scrapes and looks at its rules here, and how long an alert's cause must last: as little as can be.
const INTERVAL: &str = "1s";

/// One that runs. It ends when dropped.
#[derive(Debug)]
pub struct Prometheus {
    port: Port,
    process: Process,
}

impl Prometheus {
    /// Scrapes these control planes and these Envoys' admin ports. The files are the shipped ones but for ports and times,
    /// and for what `change` does to each.
    #[track_caller]
    pub fn start(
        directory: &Path,
        control_planes: &[u16],
        admin_ports: &[u16],
        change: impl Fn(&str) -> String,
    ) -> Self {
        let (port, directory) = (Port::reserve(), directory.join("prometheus"));
        fs::create_dir_all(directory.join("rules")).expect("a directory for Prometheus");
        let config = directory.join("prometheus.yml");
        let text = read(&monitoring().join("prometheus.yml"));
        let itself = format!("localhost:{}", port.number());
        let text = with_times(&text)
            .replace("localhost:8000", &targets(control_planes))
            .replace("localhost:9901", &targets(admin_ports))
            .replace("localhost:9090", &itself)
            // Whoever has an Alertmanager on this machine is not to hear of what a test breaks.
            .replace("localhost:9093", &itself);
        fs::write(&config, change(&text)).expect("Prometheus's configuration");
        for rules in rules() {
            let to = directory.join("rules").join(rules.file_name().expect("a file has a name"));
            fs::write(to, change(&with_times(&read(&rules)))).expect("its rules");
        }
        let log = directory.join("prometheus.log");
        let process = Process::start("prometheus", &binaries::prometheus(), &log, |command| {
            command
                .arg(format!("--config.file={}", config.display()))
                .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
                .arg(format!("--web.listen-address=127.0.0.1:{}", port.number()))
                .arg("--log.level=warn");
        });
        let mut started = Self { port, process };
        wait_until(SOON, "Prometheus to be ready", || {
            started.process.assert_runs();
            http::try_call(started.port.number(), &Request::get("/-/ready"))
                .is_ok_and(|answer| answer.status == 200)
        });
        started
    }

    /// What an expression comes to now, or what is wrong with it.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let request = Request::new("POST", "/api/v1/query")
            .header("content-type", "application/x-www-form-urlencoded")
            .body(format!("query={}", encoded(expression)));
        let answer = http::call(self.port.number(), &request).json();
        if answer["status"] != "success" {
            return Err(answer["error"].to_string());
        }
        let data = &answer["data"];
        // A scalar is a value by itself.
        let result = if data["resultType"] == "vector" { data["result"].as_array().cloned() } else { None };
        Ok(result.unwrap_or_else(|| vec![data["result"].clone()]))
    }

    /// The names of all metrics that it knows.
    #[track_caller]
    pub fn names(&self) -> BTreeSet<String> {
        let data = self.get("/api/v1/label/__name__/values");
        data.as_array().into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())).collect()
    }

    /// Its rules: `name`, `query`, `type`, and an alert's `labels` and `annotations`.
    #[track_caller]
    pub fn rules(&self) -> Vec<Value> {
        let data = self.get("/api/v1/rules");
        let groups = data["groups"].as_array().expect("groups");
        groups.iter().flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default()).collect()
    }

    /// The alerts that fire, each with its `labels` and its `annotations` as somebody would read them.
    #[track_caller]
    pub fn firing(&self) -> Vec<Value> {
        let mut alerts = self.get("/api/v1/alerts")["alerts"].as_array().cloned().unwrap_or_default();
        alerts.retain(|alert| alert["state"] == "firing");
        alerts
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        http::call(self.port.number(), &Request::get(path)).expect(200).json()["data"].clone()
    }
}

/// Where what is shipped for monitoring is.
pub fn monitoring() -> PathBuf {
    binaries::root().join("monitoring")
}

/// The files of rules that are shipped.
pub fn rules() -> Vec<PathBuf> {
    files(&monitoring().join("rules"))
}

/// The tests of those.
pub fn rule_tests() -> Vec<PathBuf> {
    files(&monitoring().join("rules/tests"))
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "yml"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "nothing in {}", directory.display());
    files
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn targets(ports: &[u16]) -> String {
    ports.iter().map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>().join(", ")
}

/// With every interval, and every time for which an alert waits, as short as can be.
fn with_times(text: &str) -> String {
    let mut changed = String::new();
    for line in text.lines() {
        let key = line.split_once(": ").map_or("", |(key, _)| key);
        match key.trim_start() {
            "for" | "interval" | "scrape_interval" | "evaluation_interval" => {
                let _ = writeln!(changed, "{key}: {INTERVAL}");
            }
            _ => {
                let _ = writeln!(changed, "{line}");
            }
        }
    }
    changed
}

fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

/// The names of the metrics in an expression of PromQL.
pub fn metrics_in(expression: &str) -> BTreeSet<String> {
    /// Before their parentheses stand labels.
    const OF_LABELS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
    /// Words that no parenthesis need follow.
    const WORDS: [&str; 11] =
        ["and", "or", "unless", "bool", "offset", "sum", "max", "min", "avg", "count", "topk"];
    let mut found = BTreeSet::new();
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        let word_end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':' || c == '.'))
            .unwrap_or(rest.len());
        match first {
            '"' | '{' | '[' => rest = after(rest, closing(first)),
            '0'..='9' => {
                // 1e-4 is one number.
                let exponent = rest[..word_end].ends_with('e') && rest[word_end..].starts_with('-');
                rest = &rest[word_end + usize::from(exponent)..];
            }
            'a'..='z' | 'A'..='Z' | '_' | ':' => {
                let (word, next) = (&rest[..word_end], rest[word_end..].trim_start());
                rest = next;
                if OF_LABELS.contains(&word) {
                    rest = after(next, ')');
                } else if !next.starts_with('(') && !WORDS.contains(&word) {
                    found.insert(word.to_owned());
                }
            }
            other => rest = &rest[other.len_utf8()..],
        }
    }
    found
}

fn closing(opening: char) -> char {
    match opening {
        '{' => '}',
        '[' => ']',
        other => other,
    }
}

/// What comes after the `end` of what `text` begins with. Strings within may have it, too.
fn after(text: &str, end: char) -> &str {
    let mut in_string = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if c == end && !in_string => return &text[at + c.len_utf8()..],
            '"' => in_string = !in_string,
            _ => {}
        }
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metrics_of_an_expression_are_found_and_nothing_else() {
        for (expression, wanted) in [
            ("up == 0", vec!["up"]),
            ("sum(rate(a_total{b=\"c}d\", e=~\"f|g\"}[5m])) > 0.1", vec!["a_total"]),
            ("histogram_quantile(0.99, sum by (le, x) (rate(a_bucket[5m])))", vec!["a_bucket"]),
            ("sum by (x) (a) / (sum(b) > 0) and on () c > bool 1e-4 * d", vec!["a", "b", "c", "d"]),
            ("avg_over_time(k:u:rate5m[1h]) > 10 / 3600 or vector(0)", vec!["k:u:rate5m"]),
            ("time() - a > 300 or on (job, instance) absent(b{c=\"d\"})", vec!["a", "b"]),
        ] {
            let found: Vec<_> = metrics_in(expression).into_iter().collect();
            assert_eq!(found, wanted, "{expression}");
        }
    }
}
