//! Emergency rules that are lifted at the next start, by an operator who may start the control plane: for when no key is left
//! that could lift them.

use std::fs;
use std::io;
use std::path::Path;

use crate::model::View;
use crate::model::author::Author;
use crate::model::commands::emergency::{self, Lift};
use crate::node::Node;
use crate::platform::files;

/// Stands in the data directory until the next start has lifted the rules that it names.
const WANTED: &str = "emergency.lift";
const ALL: &str = "all";
const LOCKDOWN: &str = "lockdown";

/// Has the control plane of a data directory lift rules at its next start.
///
/// # Errors
/// When the directory cannot be written.
pub fn want_at_start(data_dir: &Path, which: &Lift) -> io::Result<()> {
    let text = match which {
        Lift::All => ALL,
        Lift::Lockdown => LOCKDOWN,
        Lift::Cutoff(id) => id,
    };
    files::write_private(&data_dir.join(WANTED), text.as_bytes())
}

/// Lifts what was asked for, before anything is served.
pub async fn lift_if_wanted(node: &Node) {
    let file = node.config.data_dir.join(WANTED);
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            tracing::error!(%error, file = %file.display(), "it cannot be read which rules are to be lifted");
            return;
        }
    };
    let which = match text.trim() {
        ALL => Lift::All,
        LOCKDOWN => Lift::Lockdown,
        id => Lift::Cutoff(id.to_owned()),
    };
    let author = Author::part("system").because(Some("keygate emergency lift --offline".into()));
    let ordered = which.clone();
    match node.writer.submit(&author, move |view: &View<'_>| emergency::lift(view, &ordered)).await {
        Ok(Ok(_)) => tracing::warn!(?which, "emergency rules were lifted without a key, by who starts this"),
        Ok(Err(refusal)) => tracing::warn!(?which, %refusal, "nothing was lifted"),
        Err(error) => {
            tracing::error!(%error, "the rules are not lifted; the next start tries again");
            return;
        }
    }
    if let Err(error) = fs::remove_file(&file) {
        tracing::error!(%error, file = %file.display(), "it cannot be removed; the next start lifts these rules again");
    }
}
