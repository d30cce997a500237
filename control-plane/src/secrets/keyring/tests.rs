use super::*;

fn masters(master: u8, previous: Option<u8>) -> Masters {
    let key = |byte| MasterKey::of([byte; 32]);
    Masters { master: key(master), previous: previous.map(key), hsm: None }
}

fn open(dir: &Path, master: u8, previous: Option<u8>) -> Result<Keyring, KeyringError> {
    let begins_anew = !dir.join(FILE).exists();
    Keyring::open(dir, masters(master, previous), begins_anew)
}

fn filled(dir: &Path) {
    let keys = open(dir, 1, None).unwrap();
    for n in 0..5 {
        keys.put(&format!("k{n}"), &[n; 32]).unwrap();
    }
}

fn all_open(keys: &Keyring) -> bool {
    (0..5).all(|n| keys.get(&format!("k{n}")).is_ok_and(|key| key.is_some_and(|key| key == [n; 32].into())))
}

#[test]
fn what_is_put_is_there_after_a_restart_and_what_is_dropped_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let keys = open(dir.path(), 1, None).unwrap();
    assert!(all_open(&keys));
    let fellow = tempfile::tempdir().unwrap();
    let fellow = open(fellow.path(), 1, None).unwrap();
    assert_eq!(keys.root().expose(), fellow.root().expose(), "of one master key");
    assert_ne!(keys.root().expose(), &[1; 32], "the root does not give the master key away");
    assert_eq!(keys.keep_only(&BTreeSet::from(["k1"])).unwrap(), 4);
    let keys = open(dir.path(), 1, None).unwrap();
    assert!(keys.get("k0").unwrap().is_none() && keys.get("k1").unwrap().is_some());
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(dir.path().join(FILE)).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_new_master_key_takes_over_and_each_state_on_the_way_opens() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let path = dir.path().join(FILE);
    let before = std::fs::read(&path).unwrap();
    let root = *open(dir.path(), 1, None).unwrap().root().expose();
    assert!(open(dir.path(), 2, None).unwrap_err().to_string().contains("previous_master_key_file"));
    assert_eq!(std::fs::read(&path).unwrap(), before, "a wrong master key changes nothing");

    let keys = open(dir.path(), 2, Some(1)).unwrap();
    assert!(all_open(&keys));
    keys.put("k5", &[5; 32]).unwrap();
    // While both are given, a control plane with the old one alone goes on, too.
    assert!(all_open(&open(dir.path(), 1, Some(2)).unwrap()));
    let both = std::fs::read_to_string(&path).unwrap();
    // Killed half way: some entries have one wrap, some have the other, some both.
    let mut mixed: File = serde_json::from_str(&both).unwrap();
    let (old, new) = (MasterKey::of([1; 32]).id(), MasterKey::of([2; 32]).id());
    for (n, wraps) in mixed.keys.values_mut().enumerate() {
        match n % 3 {
            0 => drop(wraps.remove(&old)),
            1 => drop(wraps.remove(&new)),
            _ => {}
        }
    }
    write(&path, mixed.keys).unwrap();
    assert!(all_open(&open(dir.path(), 2, Some(1)).unwrap()));

    let keys = open(dir.path(), 2, None).unwrap();
    assert!(all_open(&keys) && keys.get("k5").unwrap() == Some([5; 32].into()));
    assert_eq!(keys.root().expose(), &root, "what was derived stays");
    assert!(!std::fs::read_to_string(&path).unwrap().contains(&old), "the old master key opens nothing");
    assert!(open(dir.path(), 1, None).is_err());
}

#[test]
fn an_entry_that_was_swapped_or_edited_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let path = dir.path().join(FILE);
    let mut keys = read(&path).unwrap().unwrap();
    let other = keys["k2"].clone();
    keys.insert("k1".into(), other);
    write(&path, keys.clone()).unwrap();
    let opened = open(dir.path(), 1, None).unwrap();
    assert!(opened.get("k1").unwrap_err().to_string().contains("k1 does not open: it was changed"));
    keys.insert(ROOT.into(), keys["k2"].clone());
    write(&path, keys).unwrap();
    assert!(open(dir.path(), 1, None).is_err());
    std::fs::write(&path, b"{").unwrap();
    assert!(open(dir.path(), 1, None).unwrap_err().to_string().contains("restore it from a backup"));
}

#[test]
fn a_keyring_that_is_missing_beside_a_journal_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let says = |opened: Result<Keyring, KeyringError>| opened.unwrap_err().to_string();
    for missing in [
        says(Keyring::open(dir.path(), masters(1, None), false)),
        says(Keyring::open(dir.path(), masters(2, Some(1)), false)),
        says(Keyring::read_only(dir.path(), masters(1, None))),
    ] {
        assert!(missing.contains("is missing") && missing.contains("restore both"), "{missing}");
    }
    assert!(!dir.path().join(FILE).exists());
}

#[test]
fn another_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let path = dir.path().join(FILE);
    let text = std::fs::read_to_string(&path).unwrap().replace(r#""format":1"#, r#""format":2"#);
    std::fs::write(&path, text).unwrap();
    let refusal = open(dir.path(), 1, None).unwrap_err().to_string();
    assert!(refusal.contains("it has format 2, this version reads 1"), "{refusal}");
}

#[test]
fn what_another_control_plane_wrapped_is_taken_if_it_opens() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    filled(one.path());
    let one = open(one.path(), 1, None).unwrap();
    let keys = open(two.path(), 1, None).unwrap();
    keys.take("k3", &one.wraps("k3").unwrap()).unwrap();
    assert_eq!(keys.get("k3").unwrap(), Some([3; 32].into()));
    assert!(keys.take("k4", &one.wraps("k3").unwrap()).is_err(), "of another place");
    assert!(keys.get("k4").unwrap().is_none());
}
