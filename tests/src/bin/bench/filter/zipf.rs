//! Which of many keys a request is of: a few are used all the time, most hardly ever (Zipf's law with exponent 1).

use keygate_e2e::durability::Dice;

/// Draws ranks.
#[derive(Debug)]
pub struct Zipf {
    /// The sum of 1/rank up to each rank.
    cumulative: Vec<f64>,
}

impl Zipf {
    /// Of so many ranks.
    pub fn new(ranks: usize) -> Self {
        let mut sum = 0.0;
        let cumulative = (1..=ranks).map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        });
        Self { cumulative: cumulative.collect() }
    }

    /// A rank, counted from 0.
    pub fn draw(&self, dice: &mut Dice) -> usize {
        /// Finer than any share of a rank.
        const STEPS: usize = 1 << 40;
        let total = self.cumulative.last().copied().unwrap_or_default();
        let drawn = dice.below(STEPS) as f64 / STEPS as f64 * total;
        self.cumulative.partition_point(|sum| *sum <= drawn).min(self.cumulative.len().saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_comes_as_often_as_one_by_its_number_says() {
        const DRAWS: usize = 200_000;
        let (zipf, mut dice) = (Zipf::new(1_000), Dice::new(7));
        let mut counts = vec![0_usize; 1_000];
        (0..DRAWS).for_each(|_| counts[zipf.draw(&mut dice)] += 1);
        // The sum of 1/rank for a thousand ranks.
        let total = 7.4855;
        for rank in [1, 2, 10, 100] {
            let (expected, found) = (DRAWS as f64 / total / rank as f64, counts[rank - 1] as f64);
            // Four standard deviations.
            assert!((found - expected).abs() < 4.0 * expected.sqrt(), "{rank}: {found} of {expected}");
        }
        assert!(counts[999] > 0);
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let zipf = Zipf::new(10_000);
        let draws = |seed| {
            let mut dice = Dice::new(seed);
            (0..100).map(|_| zipf.draw(&mut dice)).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        assert_eq!(Zipf::new(1).draw(&mut Dice::new(3)), 0);
    }
}
