//! Figures of many rounds, and how far they can be trusted.

use keygate_e2e::durability::Dice;

/// A mean with half of its 95 % confidence interval.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    pub mean: f64,
    pub ci95: f64,
}

impl Estimate {
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
    fn an_interval_contains_zero_or_not() {
        assert!(Estimate { mean: -1.0, ci95: 1.5 }.contains_zero());
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
