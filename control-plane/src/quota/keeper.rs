//! Decides which control plane keeps the ledger, and has this one keep it, pass on, or stop.

use std::sync::Arc;
use std::time::Duration;

use super::keeping::{Began, Keeping};
use super::{Basis, BookError, Role};
use crate::app::App;
use crate::change::Change;
use crate::problem::Problem;
use crate::redis_store::Intake;
use crate::state::{Keeper, State};
use crate::writer::{Committed, View};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// In whose name the first one is found.
const ACTOR: &str = "system";

/// What there is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It is not known who keeps it.
    Wait,
    /// This one says that it does.
    Claim,
    /// This one keeps it.
    Keep(Began),
    /// Another one does.
    PassOn(u64),
}

/// Looks who keeps the ledger until it is to stop.
pub async fn run(app: Arc<App>) {
    if !app.config.enforces_limits {
        return;
    }
    let mut stopping = app.stopping.clone();
    let mut last_problem = None;
    loop {
        let problem = look(&app).await.err().map(|problem| problem.to_string());
        if problem != last_problem {
            if let Some(problem) = &problem {
                tracing::error!(problem, "limits are not kept here");
            }
            last_problem = problem;
        }
        app.metrics.quota_keeper.set(f64::from(u8::from(app.quotas.here().is_some())));
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = stopping.wait_for(|stop| *stop) => return,
        }
    }
}

/// Has this control plane keep the ledger from now on, whoever did before: for when that one is gone for good.
///
/// # Errors
/// When it cannot be journalled.
pub async fn take_over(app: &App, actor: &str) -> Result<Committed, Problem> {
    let own = app.state().version.source;
    let plan = move |view: &View<'_>| {
        let is_mine = view.model.limits_keeper().is_some_and(|keeper| keeper.source == own);
        let changes = if is_mine { Vec::new() } else { vec![Change::LimitsKept { keeper: own }] };
        Ok::<_, Problem>((changes, ()))
    };
    let ((), committed) = app.writer.submit(actor, plan).await??;
    Ok(committed)
}

async fn look(app: &App) -> Result<(), anyhow::Error> {
    let state = app.state();
    match step(app, &state) {
        Step::Wait => app.quotas.play(Role::Unknown),
        Step::PassOn(source) => {
            if !matches!(app.quotas.role(), Role::Elsewhere(other) if other == source) {
                tracing::info!(keeper = format!("{source:x}"), "another control plane keeps the limits");
                app.quotas.play(Role::Elsewhere(source));
            }
        }
        Step::Keep(began) => keep(app, &state, began)?,
        Step::Claim => {
            let (before, own) = (state.limits_keeper, state.version.source);
            let plan = move |view: &View<'_>| {
                let is_same = view.model.limits_keeper() == before;
                let changes = if is_same { vec![Change::LimitsKept { keeper: own }] } else { Vec::new() };
                Ok::<_, std::convert::Infallible>((changes, ()))
            };
            let Ok(((), _)) = app.writer.submit(ACTOR, plan).await?;
            let state = app.state();
            let mine = state.limits_keeper.filter(|keeper| keeper.source == own);
            if let Some(Keeper { since, .. }) = mine {
                // Until now it was this one's, if it had any.
                let before = before.is_none().then(|| alone(&state));
                keep(app, &state, Began { since, before, first: before.is_some() })?;
            }
        }
    }
    Ok(())
}

fn step(app: &App, state: &State) -> Step {
    let keeper = state.limits_keeper;
    let Some(mirror) = &app.mirror else {
        return match keeper {
            None => Step::Keep(Began { since: alone(state), before: None, first: true }),
            Some(keeper) => of(state.version.source, state.is_own(keeper.source), keeper, false),
        };
    };
    match (keeper, mirror.intake()) {
        (Some(keeper), _) => of(state.version.source, state.is_own(keeper.source), keeper, true),
        // Whoever is alone need not wait for a Redis that is away.
        (None, Intake::Unreachable) if !state.has_peers() => Step::Claim,
        (None, Intake::Done) if mirror.leads() => Step::Claim,
        (None, _) => Step::Wait,
    }
}

/// What to do when it is decided who keeps it. `is_own`: it is this control plane, maybe by an older name.
fn of(source: u64, is_own: bool, keeper: Keeper, is_heard: bool) -> Step {
    if !is_own {
        return Step::PassOn(keeper.source);
    }
    // This journal was set back and began another line of history, by which others know it now.
    if keeper.source != source && is_heard {
        return Step::Claim;
    }
    Step::Keep(Began { since: keeper.since, before: None, first: false })
}

/// What a control plane without others keeps the ledger by: a copy that was set back has not kept what it kept since.
fn alone(state: &State) -> u64 {
    if state.lines.is_empty() { 0 } else { state.version.source }
}

fn keep(app: &App, state: &State, began: Began) -> Result<(), BookError> {
    if app.quotas.here().is_some_and(|keeping| keeping.since() == began.since) {
        return Ok(());
    }
    // First of all no other ledger is open: the file is one for all.
    app.quotas.play(Role::Unknown);
    let basis = Basis::of(app, state);
    let keeping = Keeping::open(&app.config.data_dir, basis, app.clock.now_ms(), began)?;
    app.quotas.play(Role::Here(Arc::new(keeping)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keeper_keeps_and_all_others_pass_on() {
        let keeper = Keeper { source: 7, since: 70 };
        let keeps = Step::Keep(Began { since: 70, before: None, first: false });
        for is_heard in [false, true] {
            assert_eq!(of(7, true, keeper, is_heard), keeps);
            assert_eq!(of(8, false, keeper, is_heard), Step::PassOn(7));
        }
        // A journal that was set back says its new name, where there is somebody to hear it.
        assert_eq!(of(9, true, keeper, true), Step::Claim);
        assert_eq!(of(9, true, keeper, false), keeps);
    }
}
