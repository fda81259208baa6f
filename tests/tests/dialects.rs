//! Every folder under `fixtures/dialects` is a case.

#![allow(missing_docs, clippy::unwrap_used)]

use tests::daemon::root;
use tests::golden::check;

#[tokio::test]
async fn every_golden_case_is_met_however_the_stream_is_cut() {
    let mut cases = 0;
    for dialect in std::fs::read_dir(root().join("tests/fixtures/dialects")).unwrap() {
        for case in std::fs::read_dir(dialect.unwrap().path()).unwrap() {
            check(&case.unwrap().path()).await;
            cases += 1;
        }
    }
    assert!(cases >= 25, "only {cases} cases were found");
}
