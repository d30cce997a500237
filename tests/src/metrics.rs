//! Figures that the programs under test give of themselves.

use crate::SOON;
use crate::api::Api;
use crate::envoy::Envoy;
use crate::http::Request;
use crate::wait::wait_until;

/// The control plane's metrics at one moment.
#[derive(Debug)]
pub struct Metrics(String);

impl Metrics {
    /// Those of now.
    #[track_caller]
    pub fn of(api: &Api) -> Self {
        Self(api.get("/metrics").expect(200).text())
    }

    /// The same, when there may be nobody to answer.
    pub fn try_of(api: &Api) -> Option<Self> {
        let answer = api.try_send(Request::get("/metrics")).ok()?;
        (answer.status == 200).then(|| Self(answer.text()))
    }

    /// A series by its name and labels, as they are written.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_else(|| panic!("no series {series}"))
    }

    /// The sum of all series of a metric that have certain labels, as they are written.
    pub fn sum(&self, metric: &str, labels: &[&str]) -> u64 {
        let lines = self.0.lines().filter(|line| line.starts_with(metric));
        let wanted = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
        wanted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
    }
}

/// The largest value that one of Envoy's histograms ever had until now, in the histogram's own unit; 0 when it
/// has none. Envoy's buckets are about a hundredth wide.
#[track_caller]
pub fn peak(envoy: &Envoy, histogram: &str) -> f64 {
    // Envoy brings its histograms up to date, and its uptime with them, every five seconds.
    let uptime = || envoy.stat("server.uptime");
    for _ in 0..2 {
        let before = uptime();
        wait_until(SOON, "Envoy to merge its histograms", || uptime() > before);
    }
    // name: P0(now,ever) P25(now,ever) … P100(now,ever)
    let text = envoy.admin("/stats?filter=keygate_").expect(200).text();
    let line = text.lines().find(|line| line.contains(histogram));
    line.unwrap_or_else(|| panic!("no histogram {histogram}"))
        .split_once("P100(")
        .and_then(|(_, last)| last.split_once(')')?.0.split_once(',')?.1.parse().ok())
        .unwrap_or(0.0)
}
