//! Figures of many rounds, and how far they can be trusted.

use keygate_e2e::durability::Dice;

/// A mean with half of its 95 % confidence interval.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    pub mean: f64,
    pub ci95: f64,
}

impl Estimate {
    /// Of independent values, at least two (Student, 1908).
    pub fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count.max(1.0);
        let degrees = values.len().saturating_sub(1);
        if degrees == 0 {
            return Self { mean, ci95: f64::NAN };
        }
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / degrees as f64;
        Self { mean, ci95: student(degrees) * (variance / count).sqrt() }
    }

    /// Of what was measured in pairs, how much more the first is.
    pub fn of_differences(values: &[f64], others: &[f64]) -> Self {
        Self::of(&values.iter().zip(others).map(|(value, other)| value - other).collect::<Vec<_>>())
    }

    /// What `figure` makes of so many rounds, by their numbers; the interval by what it makes of as many of them drawn at
    /// random, some twice and some not at all (the bootstrap; Efron, 1979).
    pub fn of_rounds(rounds: usize, figure: impl Fn(&[usize]) -> f64) -> Self {
        const DRAWS: usize = 1_000;
        let mut dice = Dice::new(1);
        let all: Vec<usize> = (0..rounds).collect();
        let mut drawn: Vec<f64> =
            (0..DRAWS).map(|_| figure(&all.iter().map(|_| dice.below(rounds)).collect::<Vec<_>>())).collect();
        drawn.sort_by(f64::total_cmp);
        let at = |part: f64| drawn[(part * (DRAWS - 1) as f64) as usize];
        Self { mean: figure(&all), ci95: (at(0.975) - at(0.025)) / 2.0 }
    }

    /// Whether nothing at all may be the truth.
    pub fn contains_zero(self) -> bool {
        self.mean.abs() <= self.ci95
    }
}

/// Student's t: beyond it on either side lie 2.5 %.
fn student(degrees: usize) -> f64 {
    const UP_TO_30: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    // From there on it is 1.96 + 2.4/n, to three digits.
    UP_TO_30.get(degrees.saturating_sub(1)).copied().unwrap_or(1.96 + 2.4 / degrees as f64)
}

/// A quarter of them are less: what something takes that is disturbed now and then, which only ever adds to it.
pub fn lower_quartile(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 4).copied().unwrap_or(f64::NAN)
}

/// The one in the middle; of an even number the mean of both.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.as_slice() {
        [] => f64::NAN,
        sorted if sorted.len() % 2 == 1 => sorted[middle],
        sorted => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_students() {
        // Standard deviation 1.5811, of the mean 0.7071, t of four degrees 2.776.
        let estimate = Estimate::of(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        assert!((estimate.mean - 3.0).abs() < 1e-9);
        assert!((estimate.ci95 - 1.963).abs() < 1e-3, "{estimate:?}");
        assert_eq!(Estimate::of(&[2.0, 2.0, 2.0]), Estimate { mean: 2.0, ci95: 0.0 });
        assert!(Estimate::of(&[1.0]).ci95.is_nan());
        assert!((student(31) - 2.040).abs() < 3e-3 && (student(120) - 1.980).abs() < 1e-3);
    }

    #[test]
    fn pairs_cancel_what_both_have() {
        let (with, without) = ([11.0, 22.0, 33.0], [10.0, 21.0, 32.0]);
        assert_eq!(Estimate::of_differences(&with, &without), Estimate { mean: 1.0, ci95: 0.0 });
        assert!(Estimate::of_differences(&[1.0, 2.0, 3.0], &[2.0, 2.0, 2.0]).contains_zero());
        assert!(!Estimate { mean: 1.0, ci95: 0.5 }.contains_zero());
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn what_disturbs_some_rounds_is_not_in_the_lower_quartile() {
        let rounds: Vec<f64> =
            (0..40).map(|n| if n % 3 == 0 { 500.0 } else { 100.0 + f64::from(n % 5) }).collect();
        let figure = |chosen: &[usize]| lower_quartile(chosen.iter().map(|n| rounds[*n]));
        let estimate = Estimate::of_rounds(rounds.len(), figure);
        assert!((100.0..=102.0).contains(&estimate.mean) && estimate.ci95 <= 2.0, "{estimate:?}");
        assert_eq!(Estimate::of_rounds(9, |chosen| chosen.len() as f64), Estimate { mean: 9.0, ci95: 0.0 });
        assert!(lower_quartile(std::iter::empty()).is_nan());
    }
}
