use super::*;
use std::sync::Mutex;

/// A stack over nodes, of which those named in `broken` answer 502.
struct Fleet {
    nodes: Vec<Candidate>,
    broken: Arc<Mutex<Vec<&'static str>>>,
    layer: RouteLayer,
}

impl Fleet {
    fn new(nodes: &[&str]) -> Self {
        let routing = example_routing("round_robin");
        let policy = routing.policy().expect("a policy");
        Self {
            nodes: nodes.iter().map(|node| Candidate::example(node)).collect(),
            broken: Arc::default(),
            layer: RouteLayer::new(policy, routing, RouteMetrics::new(&Registry::new())),
        }
    }

    /// The node that one more request goes to, and its answer if there is one.
    async fn ask(&self, session: Option<&str>) -> (Option<String>, Option<Response>) {
        let mut request = example_request("{}");
        if let Some(session) = session {
            let session = HeaderValue::from_str(session).expect("a value");
            request.head.headers.insert("x-session-id", session);
        }
        request.candidates = self.nodes.clone().into();
        let exchange = request.exchange.clone();
        let broken = self.broken.clone();
        let upstream = tower::service_fn(move |request: Request| -> ResponseFuture {
            let node = request.endpoint.expect("routed").node.clone();
            let fails = broken.lock().expect("one thread").contains(&&*node);
            let error = ApiError::new(ErrorKind::BadGateway, "broken");
            Box::pin(std::future::ready(if fails {
                Err(Failure::of_node(error))
            } else {
                Ok(Response::new(Body::whole("fine")))
            }))
        });
        let answer = self.layer.layer(upstream).call(request).await.ok();
        (exchange.node().map(|node| node.to_string()), answer)
    }

    async fn asked(&self, times: usize) -> Vec<String> {
        let mut nodes = Vec::new();
        for _ in 0..times {
            nodes.extend(self.ask(None).await.0);
        }
        nodes
    }
}

#[tokio::test]
async fn a_node_whose_requests_fail_is_passed_over() {
    let fleet = Fleet::new(&["a", "b", "c"]);
    fleet.broken.lock().expect("one thread").push("b");
    fleet.asked(9).await; // three to each
    assert!(fleet.nodes[1].endpoint.load.is_open());
    let after = fleet.asked(12).await;
    assert!(!after.contains(&"b".into()), "{after:?}");
}

#[tokio::test]
async fn when_all_circuits_are_open_nodes_are_asked_all_the_same() {
    let fleet = Fleet::new(&["a", "b"]);
    *fleet.broken.lock().expect("one thread") = vec!["a", "b"];
    fleet.asked(6).await;
    assert!(fleet.nodes.iter().all(|node| node.endpoint.load.is_open()));
    assert_eq!(fleet.asked(4).await.len(), 4);
}

#[tokio::test]
async fn a_node_that_can_be_reached_again_has_one_trial() {
    let fleet = Fleet::new(&["a", "b"]);
    let load = &fleet.nodes[0].endpoint.load;
    load.set_failing(true);
    fleet.broken.lock().expect("one thread").push("a");
    for _ in 0..3 {
        load.failed(false, &fleet.layer.shared.routing.breaker);
    }
    assert!(!fleet.asked(4).await.contains(&"a".into()));
    load.set_failing(false);
    let trials = fleet.asked(6).await;
    assert_eq!(trials.iter().filter(|node| *node == "a").count(), 1);
    fleet.broken.lock().expect("one thread").clear();
    load.set_failing(true);
    load.set_failing(false);
    fleet.asked(2).await;
    assert!(!load.is_open(), "the second trial went well");
}

#[tokio::test]
async fn a_session_stays_with_its_node_until_that_is_overloaded() {
    let fleet = Fleet::new(&["a", "b", "c"]);
    let (home, _) = fleet.ask(Some("s")).await;
    for _ in 0..5 {
        assert_eq!(fleet.ask(Some("s")).await.0, home);
    }
    let held = [fleet.ask(Some("s")).await.1, fleet.ask(Some("s")).await.1];
    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(fleet.ask(Some("s")).await.0);
    }
    let at_home = others.iter().filter(|node| **node == home).count();
    assert_eq!(at_home, 1, "with two in flight it has its turn and no more");
    drop(held);
    assert_eq!(fleet.ask(Some("s")).await.0, home);
}

#[tokio::test]
async fn a_replica_that_leaves_gets_no_request() {
    let fleet = Fleet::new(&["a", "b"]);
    assert!(fleet.nodes[0].replica.try_leave());
    assert_eq!(fleet.asked(4).await, ["b"; 4]);
    assert!(fleet.nodes[1].replica.try_leave());
    let (node, answer) = fleet.ask(None).await;
    assert!(node.is_none() && answer.is_none());
}

#[tokio::test]
async fn a_torn_stream_counts_against_its_node() {
    let fleet = Fleet::new(&["a"]);
    for _ in 0..3 {
        let request = example_request("{}");
        let attempt = fleet
            .layer
            .shared
            .begin(&request.exchange, &fleet.nodes[0], How::Only, true);
        request.exchange.mark_torn();
        drop(attempt);
    }
    assert!(fleet.nodes[0].endpoint.load.is_open());
}
