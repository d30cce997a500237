//! What somebody put in the place of a key of Keygate's own: something of another type, which no command of
//! Keygate's can use. It is taken away, and what was there is written again from the journal.

use super::error::LinkError;
use super::link::Link;
use super::names;

/// Takes away what stands under Keygate's own names and is of another type. `source`: of this control plane.
///
/// # Errors
/// When Redis cannot be asked, or refuses.
pub async fn remove(link: &Link, source: u64) -> Result<(), LinkError> {
    let [holder, fence] = names::lease("scheduled");
    let mut own = vec![
        (names::SOURCES.to_owned(), "set"),
        (names::REPORTS.to_owned(), "hash"),
        (names::log(source), "stream"),
        (holder, "string"),
        (fence, "string"),
    ];
    for key in names::OperatorKey::ALL.map(names::OperatorKey::name) {
        own.push((names::written(key), "hash"));
        own.push((names::claim(key), "string"));
    }
    remove_all(link, &own).await?;
    let sources: Vec<String> = link.query(redis::cmd("SMEMBERS").arg(names::SOURCES)).await?;
    let logs = sources.iter().filter_map(|text| u64::from_str_radix(text, 16).ok());
    let logs: Vec<_> = logs.map(|source| (names::log(source), "stream")).collect();
    remove_all(link, &logs).await
}

/// Each name with the type that it should have.
async fn remove_all(link: &Link, names: &[(String, &str)]) -> Result<(), LinkError> {
    for (name, wanted) in names {
        let kind: String = link.query(redis::cmd("TYPE").arg(name)).await?;
        if kind != "none" && kind != *wanted {
            tracing::error!(key = name, kind, wanted, "something else stood there; it is written anew");
            link.query::<redis::Value>(redis::cmd("DEL").arg(name)).await?;
        }
    }
    Ok(())
}
