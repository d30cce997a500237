//! How a limit is divided among those who ask for it.

/// A member's demand for units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Need {
    /// Units in a window's time.
    pub wanted: u32,
    /// How many to give at most now.
    pub most: u32,
}

/// Divides `limit` units. If that is enough for all, each gets what it wants, and all get alike of the rest.
/// Else each gets in proportion to what it wants, so that a request has the same chance wherever it arrives. Nobody
/// who wants something gets nothing, where the limit is large enough for that to be little.
pub(super) fn divide(limit: u32, needs: &[Need]) -> Vec<u32> {
    let mut parts: Vec<Option<u32>> = vec![None; needs.len()];
    let mut rest = u64::from(limit);
    let mut wanted: u64 = needs.iter().map(|need| u64::from(need.wanted)).fold(0, u64::saturating_add);
    // Whoever would get more than its most gets that, and the others divide what is left.
    loop {
        let mut settled = false;
        for (part, need) in parts.iter_mut().zip(needs).filter(|(part, _)| part.is_none()) {
            let share = portion(rest, wanted, need.wanted);
            if share > u64::from(need.most) {
                *part = Some(need.most);
                rest = rest.saturating_sub(need.most.into());
                wanted = wanted.saturating_sub(need.wanted.into());
                settled = true;
            }
        }
        if !settled {
            break;
        }
    }
    let (divided, of) = (rest, wanted);
    let least = u64::from(limit) >= u64::try_from(needs.len()).unwrap_or(u64::MAX).saturating_mul(16);
    let mut parts: Vec<u64> = parts
        .iter()
        .zip(needs)
        .map(|(part, need)| {
            let part = match part {
                Some(part) => return u64::from(*part),
                None => portion(divided, of, need.wanted),
            };
            let part = if part == 0 && least && need.wanted > 0 { 1 } else { part };
            let part = part.min(rest);
            rest = rest.saturating_sub(part);
            part
        })
        .collect();
    // What is left goes to all alike, up to the most that each may have.
    loop {
        let room = |part: u64, need: &Need| u64::from(need.most).saturating_sub(part);
        let takers = parts.iter().zip(needs).filter(|(part, need)| room(**part, need) > 0).count();
        let Some(each) = rest.checked_div(u64::try_from(takers).unwrap_or(u64::MAX)) else { break };
        if rest == 0 {
            break;
        }
        for (part, need) in parts.iter_mut().zip(needs) {
            let more = each.max(1).min(room(*part, need)).min(rest);
            *part = part.saturating_add(more);
            rest = rest.saturating_sub(more);
        }
    }
    parts.into_iter().map(|part| u32::try_from(part).unwrap_or(u32::MAX)).collect()
}

/// A member's part of `rest` units, who wants `wanted` where all together want `of`.
fn portion(rest: u64, of: u64, wanted: u32) -> u64 {
    if of <= rest {
        return wanted.into();
    }
    rest.saturating_mul(wanted.into()).checked_div(of).unwrap_or(0)
}
