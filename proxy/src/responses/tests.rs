use super::*;
use bytes::Bytes;
use futures::future::join_all;

const WIDE: Bounds = Bounds {
    entries: 100,
    bytes: 1 << 20,
};

fn stored(id: &str, previous: Option<&str>) -> Stored {
    Stored {
        id: id.into(),
        previous: previous.map(Into::into),
        input: Bytes::from_static(br#""a \"question\"""#),
        response: Bytes::from(format!(r#"{{"id":"{id}","output":[]}}"#)),
    }
}

fn open(path: Option<&Path>, bounds: Bounds) -> (Arc<Responses>, Registry) {
    let registry = Registry::new();
    let store = Responses::open(path, bounds, &registry).expect("opens");
    (store, registry)
}

fn shown(registry: &Registry, name: &str) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name);
    let metric = &family.expect("is registered").get_metric()[0];
    metric.get_gauge().get_value() + metric.get_counter().get_value()
}

/// Runs `check` on a store in memory and on one in a file.
async fn in_both<F: Future<Output = ()>>(
    bounds: Bounds,
    check: impl Fn(Arc<Responses>, Registry) -> F,
) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("responses");
    for path in [None, Some(&*file)] {
        let (store, registry) = open(path, bounds);
        check(store, registry).await;
    }
}

#[tokio::test]
async fn a_response_is_got_as_it_was_put_until_it_is_deleted() {
    in_both(WIDE, |store, registry| async move {
        let first = stored("resp_1", None);
        let second = stored("resp_2", Some("resp_1"));
        store.put(first.clone()).await.expect("keeps");
        store.put(second.clone()).await.expect("keeps");
        let got = store.get("resp_2").await.expect("reads");
        assert_eq!(got.as_deref(), Some(&second));
        assert_eq!(shown(&registry, "cortex_responses_kept"), 2.0);
        let size = (first.size() + second.size()) as f64;
        assert_eq!(shown(&registry, "cortex_responses_kept_bytes"), size);
        assert!(store.delete("resp_2").await.expect("deletes"));
        assert!(
            !store.delete("resp_2").await.expect("looks"),
            "it is gone already"
        );
        assert_eq!(store.get("resp_2").await.expect("reads"), None);
        let got = store.get("resp_1").await.expect("reads");
        assert_eq!(got.as_deref(), Some(&first));
        assert_eq!(shown(&registry, "cortex_responses_kept"), 1.0);
    })
    .await;
}

#[tokio::test]
async fn the_store_stays_within_its_bounds() {
    let three = Bounds { entries: 3, ..WIDE };
    in_both(three, |store, registry| async move {
        for number in 0..5 {
            let response = stored(&format!("resp_{number}"), None);
            store.put(response).await.expect("keeps");
        }
        assert_eq!(store.get("resp_1").await.expect("reads"), None);
        assert!(store.get("resp_2").await.expect("reads").is_some());
        assert_eq!(shown(&registry, "cortex_responses_evicted_total"), 2.0);
        store.set_bounds(Bounds {
            entries: 1,
            ..three
        });
        store.put(stored("resp_5", None)).await.expect("keeps");
        assert_eq!(shown(&registry, "cortex_responses_kept"), 1.0);
        store.set_bounds(Bounds {
            entries: 0,
            ..three
        });
        assert!(!store.keeps());
    })
    .await;
}

#[tokio::test]
async fn many_at_once_are_all_kept() {
    in_both(WIDE, |store, _| async move {
        let puts = (0..80).map(|number| store.put(stored(&format!("resp_{number}"), None)));
        for put in join_all(puts).await {
            put.expect("keeps");
        }
        let gets = (0..80).map(|number| store.get(&format!("resp_{number}")));
        for got in join_all(gets).await {
            assert!(got.expect("reads").is_some());
        }
    })
    .await;
}

#[tokio::test]
async fn a_file_outlives_its_process_and_keeps_to_new_bounds() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("responses");
    let (store, _) = open(Some(&file), WIDE);
    for number in 0..4 {
        let response = stored(&format!("resp_{number}"), None);
        store.put(response).await.expect("keeps");
    }
    assert!(store.delete("resp_2").await.expect("deletes"));
    assert!(
        Responses::open(Some(&file), WIDE, &Registry::new()).is_err(),
        "a file has one owner"
    );
    drop(store);
    let two = Bounds { entries: 2, ..WIDE };
    let store = reopened(&file, two).await;
    for (id, there) in [
        ("resp_0", false),
        ("resp_1", true),
        ("resp_2", false),
        ("resp_3", true),
    ] {
        let got = store.get(id).await.expect("reads");
        assert_eq!(got.is_some(), there, "{id}");
    }
    store.put(stored("resp_4", None)).await.expect("keeps");
    assert_eq!(
        store.get("resp_1").await.expect("reads"),
        None,
        "the oldest went"
    );
}

/// The writer of a store that was dropped lets go of the file in its own time.
async fn reopened(file: &Path, bounds: Bounds) -> Arc<Responses> {
    for _ in 0..10_000 {
        if let Ok(store) = Responses::open(Some(file), bounds, &Registry::new()) {
            return store;
        }
        tokio::task::yield_now().await;
    }
    panic!("the file was not let go");
}
