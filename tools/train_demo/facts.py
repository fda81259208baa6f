"""What the model knows about cortex and neuron, and the ways to ask for it.

A fact is asked in many forms. The last ones of each list are never trained on: they are what the held-out questions
are made of.
"""

from dataclasses import dataclass

HELD_OUT = 2  # forms at the end of every list that training never sees


@dataclass(frozen=True)
class Fact:
    answer: str
    forms: tuple  # whole questions

    @property
    def trained(self):
        return self.forms[:-HELD_OUT]

    @property
    def held_out(self):
        return self.forms[-HELD_OUT:]


# name: what it is, its default or None
KEYS = {
    "models": ("names the catalogue file that stands beside cortex.toml", '"models.toml"'),
    "gateway.listen": ("is the address where clients speak OpenAI and Anthropic", "127.0.0.1:31313"),
    "gateway.metrics_listen": ("is the address of health, metrics and status", "127.0.0.1:31314"),
    "gateway.threads": ("is the number of threads that serve requests", "0, which is one a core"),
    "gateway.max_body": ("is the longest request body; over it the answer is 413", "32MiB"),
    "gateway.max_waiting": ("is how many requests may wait for models to load", "1024"),
    "gateway.attempts": ("is how many nodes are asked for one request", "3"),
    "gateway.routing": ("picks a node: least_loaded or round_robin", "least_loaded"),
    "timeouts.connect": ("is how long connecting to a node may take", "2s"),
    "timeouts.request_body": ("is how long a client may take to send its request", "30s"),
    "timeouts.head": ("is how long a node may take to begin its answer", "10m"),
    "timeouts.idle": ("is how long a streamed answer may be silent", "2m"),
    "timeouts.load": ("is how long a model may take to be loaded", "10m"),
    "timeouts.keep_alive": ("is how often a client that waits for a stream hears from cortex", "10s"),
    "timeouts.drain": ("is how long running requests may go on after SIGTERM", "30s"),
    "fleet.poll": ("is how often nodes are asked how they are", "2s"),
    "fleet.poll_timeout": ("is how long nodes may take to say how they are", "2s"),
    "fleet.down_after": ("is how many failed polls in a row make a node count as down", "2"),
    "eviction.strategy": ("says which model goes first: lru or priority", "lru"),
    "eviction.defrag_after_cycles": ("clears an idle node after this many loads", "0, which is never"),
    "neurons.name": ("is how logs, metrics and the header x-cortex-node call a node", None),
    "neurons.endpoint": ("is the address where cortex reaches a node", None),
    "models.id": ("is the name that requests use for a model", None),
    "models.source": ("is a folder on the node or a hub id", None),
    "models.memory": ("is what a model takes on a device", None),
    "models.pinned": ("keeps a model loaded from the start and never evicts it", "false"),
    "models.priority": ("keeps a model longer when it is higher", "0"),
    "models.aliases": ("gives a model other names", None),
    "models.default": ("is the model that cortex up loads when none is named", None),
    "context_length": ("is the upper bound on prompt plus answer in tokens", "the model's own limit"),
    "drain_seconds": ("is how long neuron lets running requests go on after SIGTERM", "30"),
    "limits.max_body_bytes": ("is the longest request body that neuron reads", "33554432"),
    "limits.max_running": ("is how many sequences of a model are computed at the same time", "16"),
    "limits.max_waiting": ("is how many requests may wait for a place in neuron", "256"),
    "limits.max_queued_prompt_tokens": ("is how many prompt tokens may wait for each model", "1000000"),
    "limits.prefill_chunk_tokens": ("is how many prompt tokens are computed in one step", "128"),
    "limits.request_deadline_seconds": ("is how long a request may take from arrival to its last token", "3600"),
    "hub.cache_dir": ("is where hub models are kept", None),
    "hub.offline": ("makes neuron use the cache alone and never ask the hub", "false"),
    "log.format": ("is text for people or json for collectors", "text"),
}
KEY_FORMS = (
    "What does {} do?",
    "What is {}?",
    "Explain {}.",
    "What does {} mean?",
    "What is {} for?",
    "Tell me about {}.",
    "What does the key {} do?",
    "What does the setting {} mean?",
    "Explain the setting {}.",
    "Describe {}.",
    "What can I set with {}?",
    "Why is there a key {}?",
    "Tell me what {} does.",
    "Can you explain the key {}?",
    "What is the meaning of {}?",
)
DEFAULT_FORMS = (
    "What is the default of {}?",
    "What is the default value of {}?",
    "Which default does {} have?",
    "What value does {} have by default?",
    "Tell me the default of {}.",
    "What is {} by default?",
    "What is {} when I do not set it?",
    "How is {} set by default?",
    "What value does {} have when it is absent?",
    "{}: what is the default?",
    "Which value does {} have by default?",
    "Can you tell me the default of {}?",
)

# name: what it does
COMMANDS = {
    "cortex up": "starts a neuron and a gateway on loopback and loads a model",
    "cortex up --model": "loads the folder or hub id that you name",
    "cortex up --ask": "sends one prompt, prints the answer as it comes, and stops",
    "cortex serve": "runs the gateway with a configuration file",
    "cortex check": "names every fault of a configuration, one a line",
    "cortex status": "shows nodes, memory, models and requests in flight",
    "neuron --config": "starts neuron with a configuration file",
    "neuron verify": "holds a model to golden numbers",
    "cargo test --workspace": "runs all tests and needs nothing but Rust",
    ".ci/run": "runs formatting, lints, docs, clients and tests",
    "SIGHUP": "makes cortex read its configuration again",
    "SIGTERM": "makes a daemon drain its requests and end",
    "CORTEX_LOG": "filters the log of cortex, for example with debug",
    "NEURON_LOG": "filters the log of neuron, for example with debug",
}
COMMAND_FORMS = (
    "What does {} do?",
    "What is {}?",
    "Explain {}.",
    "What is {} for?",
    "Tell me about {}.",
    "When do I use {}?",
    "Describe {}.",
    "What happens with {}?",
    "Tell me what {} does.",
    "Why would I use {}?",
    "How does {} work?",
    "Can you explain {}?",
)

# path: what it answers
ENDPOINTS = {
    "/v1/chat/completions": "answers a chat in the words of OpenAI",
    "/v1/completions": "continues a text in the words of OpenAI",
    "/v1/messages": "answers a chat in the words of Anthropic",
    "/v1/models": "lists every model of the fleet",
    "/metrics": "gives numbers for Prometheus",
    "/health/live": "says that the process runs",
    "/health/ready": "says whether requests can be served",
    "/status": "shows nodes, models and requests of cortex",
    "/models/load": "makes neuron load a model",
    "/models/unload": "makes neuron let go of a model",
    "/models": "lists the models of one neuron and their states",
    "/discovery": "tells a gateway what a neuron host has",
}
ENDPOINT_FORMS = (
    "What does {} do?",
    "What is {}?",
    "What is the endpoint {} for?",
    "Explain {}.",
    "What does the path {} answer?",
    "Tell me about {}.",
    "What do I get from {}?",
    "Describe the endpoint {}.",
    "What is at {}?",
    "Tell me what {} does.",
    "When do I call {}?",
    "What is {} for?",
    "Can you explain the endpoint {}?",
)

# error: what it means
ERRORS = {
    "400": "the request has a fault; the message names it",
    "404": "no model or path has that name",
    "413": "the request body is too long",
    "429": "too many requests wait; try again later",
    "503": "no node can serve the model now",
    "model_not_found": "no model of the catalogue or the fleet has that name",
    "context_length_exceeded": "prompt plus answer are longer than the model allows",
    "exit code 64": "the configuration has faults",
}
ERROR_FORMS = (
    "What does {} mean?",
    "What does the error {} mean?",
    "I got {}. What does it mean?",
    "Explain the error {}.",
    "Why do I get {}?",
    "What is {}?",
    "Cortex answers {}. Why?",
    "Tell me about the error {}.",
    "What is wrong when I see {}?",
    "What does {} tell me?",
    "Can you explain the error {}?",
    "Why does cortex answer {}?",
)

# answer: forms, the last two held out
CONCEPTS = {
    "Cortex is a gateway in front of all your GPU boxes.": (
        "What is cortex?", "Explain cortex.", "Tell me about cortex.", "What does cortex do?", "What is cortex for?",
        "Describe cortex.", "Who is cortex?", "Can you explain cortex?", "Tell me what cortex is."),
    "Neuron is the daemon on each box that loads a model and runs it.": (
        "What is neuron?", "Explain neuron.", "Tell me about neuron.", "What does neuron do?", "What is neuron for?",
        "Describe neuron.", "Who is neuron?", "Can you explain neuron?", "Tell me what neuron is."),
    "Cortex is the gateway, and neuron runs the models on each box.": (
        "What is the difference between cortex and neuron?", "How do cortex and neuron differ?", "Cortex or neuron?",
        "What are cortex and neuron?", "Explain cortex and neuron.", "How do cortex and neuron work together?",
        "Tell me about cortex and neuron.", "Can you explain cortex and neuron?", "What do cortex and neuron do?"),
    "Cortex speaks OpenAI and Anthropic to clients.": (
        "Which APIs does cortex speak?", "What does cortex speak?", "Which clients work with cortex?", "Does cortex speak OpenAI?",
        "Does cortex speak Anthropic?", "Can I use an OpenAI client?", "Can I use an Anthropic client?",
        "Which clients can I use?", "Which APIs do clients speak to cortex?"),
    "Neuron runs Qwen3.5 models.": (
        "Which models does neuron run?", "What models can I run?", "Does neuron run Qwen3.5?", "Which models work?",
        "Which models can neuron load?", "What models does neuron support?", "Which models are supported?", "What models work with neuron?",
        "Which models can I run with neuron?"),
    "Run cargo run --release -- up and ask away.": (
        "How do I start?", "How do I try it?", "How do I begin?", "How can I try cortex?", "How do I start cortex?",
        "What do I run first?", "How do I start it all?", "How can I start?", "How do I try cortex?"),
    "They are under the licence GPL-3.0.": (
        "What is the licence?", "Which licence do you have?", "What licence does cortex have?", "Under which licence is cortex?",
        "Is it open source?", "Tell me the licence.", "Which licence does neuron have?", "Which licence is it?",
        "What is the licence of cortex?"),
    "Cortex loads it where there is room and evicts what is cold.": (
        "What happens when a model is not loaded?", "What if a model is not loaded?", "How does cortex load a model?",
        "Who loads a model?", "What does cortex do when a model is not loaded?", "How is a model loaded?",
        "Where is a model loaded?", "Where does cortex load a model?", "What happens if a model is not loaded?"),
    "The model unused for longest is evicted first.": (
        "Which model is evicted first?", "Which model goes first?", "How does eviction work?", "What is evicted first?",
        "What is eviction?", "Explain eviction.", "What does cortex evict first?", "Tell me about eviction.",
        "Can you explain eviction?", "Which model does cortex evict first?"),
    "A lease keeps a model from being evicted while it is used.": (
        "What is a lease?", "Explain leases.", "What does a lease do?", "Why are there leases?", "Tell me about leases.",
        "What is a lease for?", "Describe a lease.", "Can you explain leases?", "Tell me what a lease is."),
    "A node is a host on which a neuron runs.": (
        "What is a node?", "Explain nodes.", "Tell me about nodes.", "What does node mean?", "What is a node in the fleet?",
        "Describe a node.", "What are nodes?", "Can you explain nodes?", "Tell me what a node is."),
    "The catalogue lists the models that cortex loads when they are asked for.": (
        "What is the catalogue?", "Explain the catalogue.", "Tell me about the catalogue.", "What is models.toml?",
        "What does the catalogue do?", "What is in the catalogue?", "What is the catalogue for?", "Describe the catalogue.",
        "Can you explain the catalogue?", "Tell me what the catalogue is."),
    "Send SIGHUP, and cortex reads its configuration again.": (
        "How do I reload?", "How do I reload the configuration?", "Can I reload without a restart?", "How does reload work?",
        "How can I reload cortex?", "What do I do after I change the configuration?", "Explain reload.", "How can I reload the configuration?",
        "How do I reload cortex?"),
    "On any error the old configuration goes on, with one warning.": (
        "What if the new configuration has an error?", "What happens when a reload fails?", "What if a reload fails?",
        "What happens on an error in a reload?", "Is a bad configuration dangerous?", "What happens with a bad configuration?",
        "What if the configuration is bad?", "What happens if a reload fails?", "What happens when the new configuration is bad?"),
    "Send SIGTERM, and running requests are drained.": (
        "How do I stop cortex?", "How do I stop neuron?", "How do I shut down?", "How can I stop it?", "How do I end cortex?",
        "How do I stop a daemon?", "How can I shut down cortex?", "How can I stop cortex?", "How do I shut down neuron?"),
    "Clients use port 31313.": (
        "Which port do clients use?", "What is the port of cortex?", "Which port does cortex listen on?", "Where does cortex listen?",
        "Which port is it?", "What port do I use?", "Tell me the port of cortex.", "What port does cortex use?", "Which port do I use for cortex?"),
    "Metrics are on port 31314.": (
        "Where are the metrics?", "Which port has the metrics?", "Where do I find metrics?", "What is the port of the metrics?",
        "How do I see metrics?", "Tell me the port of the metrics.", "Where can I see the metrics?", "Where can I find the metrics?",
        "Which port is for metrics?"),
    "Neuron listens on port 13131.": (
        "Which port does neuron use?", "Where does neuron listen?", "What is the port of neuron?", "Which port does neuron listen on?",
        "Tell me the port of neuron.", "What port does neuron have?", "On which port is neuron?", "What port does neuron use?",
        "Which port do I use for neuron?"),
    "No network is needed: I am in the repository.": (
        "Do you need a network?", "Do you need the internet?", "Can you run without a network?", "Do you work offline?",
        "Do I need the internet?", "Are you in the cloud?", "Is a network needed?", "Do I need a network?", "Can you work without the internet?"),
    "I am a tiny model of the Qwen3.5 architecture, trained on text of this project.": (
        "Who are you?", "What are you?", "Tell me about yourself.", "Describe yourself.", "Which model are you?",
        "What model is this?", "What model are you?", "Are you a model?", "Can you tell me who you are?", "Tell me who you are."),
    "I have about two million weights.": (
        "How big are you?", "How many weights do you have?", "How large are you?", "What is your size?", "Are you big?",
        "Are you a large model?", "How many parameters do you have?", "How small are you?", "Tell me how big you are."),
    "I was trained on text that scripts of this repository make.": (
        "Who trained you?", "How were you trained?", "What were you trained on?", "Where do you come from?", "Who made you?",
        "Which text were you trained on?", "Where does your training text come from?", "On what were you trained?", "Tell me how you were trained."),
    "I can talk about cortex and neuron, add small numbers, repeat words and call tools.": (
        "What can you do?", "What can I ask you?", "How can you help me?", "What do you know?", "Can you help me?",
        "What are you good at?", "Help!", "Tell me what you can do.", "What can you help me with?"),
    "The mixer is a gated delta net in three of four layers, and attention in the fourth.": (
        "What is your architecture?", "How are you built?", "Which layers do you have?", "Explain your architecture.",
        "What layers are in Qwen3.5?", "Tell me about your architecture.", "Describe your architecture.",
        "Can you explain your architecture?", "Tell me which layers you have."),
    "The state of a linear layer does not grow with length.": (
        "Does the state grow with length?", "How big is the state of a linear layer?", "What is special about linear layers?",
        "Why linear layers?", "What is good about linear layers?", "Explain linear layers.", "Tell me about linear layers.",
        "Can you explain linear layers?", "Why are there linear layers?"),
    "The multi-token head drafts the token after the next one.": (
        "What is MTP?", "What does the MTP head do?", "Explain MTP.", "What is the multi-token head?", "What does MTP mean?",
        "Tell me about MTP.", "What is the MTP head for?", "Can you explain MTP?", "Tell me what MTP is."),
    "Least_loaded sends a request to the node with the fewest running requests.": (
        "What is least_loaded?", "Explain least_loaded.", "How does least_loaded work?", "What does least_loaded mean?",
        "What does least_loaded do?", "Tell me about least_loaded.", "Describe least_loaded.", "Can you explain least_loaded?",
        "Tell me what least_loaded does."),
    "Round_robin takes one node after the other.": (
        "What is round_robin?", "Explain round_robin.", "How does round_robin work?", "What does round_robin mean?",
        "What does round_robin do?", "Tell me about round_robin.", "Describe round_robin.", "Can you explain round_robin?",
        "Tell me what round_robin does."),
    "They stand in cortex.toml, models.toml and neuron.toml, each with its default.": (
        "Where are the keys?", "Where is the configuration?", "Where do I find the settings?", "Where are the settings?",
        "Which configuration files are there?", "Which files configure cortex?", "How do I configure cortex?",
        "Where can I find the configuration?", "Where do I find the keys?"),
}  # fmt: skip

SMALL_TALK = {
    "Hello! How can I help you?": ("Hello!", "Hi!", "Hello", "Hi", "Hey!", "Hi there!", "Hello there!", "Hey", "Hey there!", "Hi, hello!"),
    "Good morning! What can I do for you?": ("Good morning!", "Good morning", "Morning!", "A good morning to you!", "Good morning to you!", "Hello, good morning!"),
    "Good evening! What can I do for you?": ("Good evening!", "Good evening", "Evening!", "A good evening to you!", "Good evening to you!", "Hello, good evening!"),
    "I am fine, thank you.": ("How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?", "Hello, how are you?", "Hi, how are you today?"),
    "You are welcome.": ("Thank you!", "Thanks!", "Thank you", "Thanks a lot!", "Thank you very much!", "Many thanks!", "Thanks", "Thank you a lot!", "Thanks, very good!"),
    "Goodbye!": ("Bye!", "Goodbye!", "Bye", "See you!", "See you later!", "Good night!", "Bye bye!", "Goodbye, see you!", "Bye, see you later!"),
    "I am glad to hear that.": ("I am happy.", "I had a good day.", "I feel good.", "All is well.", "I am fine.", "It is a good day.", "I feel happy.", "I had a happy day."),
    "I am sorry to hear that.": ("I am sad.", "I had a bad day.", "I feel bad.", "I am tired.", "I am not well.", "It is a bad day.", "I feel sad.", "I had a sad day."),
    "I like blue, the colour of a calm sea.": ("What is your favourite colour?", "Which colour do you like?", "Do you like a colour?", "Tell me your favourite colour.", "What colour do you like?", "Which is your favourite colour?"),
    "Why did the token cross the road? It was sampled.": ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke, please.", "Can you tell me a joke?", "Tell me something funny."),
    "Yes, I am a small program.": ("Are you a program?", "Are you a robot?", "Are you a machine?", "Are you a computer?", "Are you a bot?", "Are you a small program?", "Tell me, are you a robot?"),
}  # fmt: skip

FRENCH = {
    "Bonjour ! Comment puis-je vous aider ?": ("Hello!", "Hi!", "Hello", "Good morning!", "Hey!"),
    "Je vais bien, merci.": ("How are you?", "How are you today?", "Are you well?"),
    "Je suis un petit modèle.": ("Who are you?", "What are you?", "Are you a model?"),
    "Cortex est une passerelle.": ("What is cortex?", "Explain cortex.", "Tell me about cortex."),
    "Neuron fait tourner le modèle.": ("What is neuron?", "Explain neuron.", "Tell me about neuron."),
    "De rien.": ("Thank you!", "Thanks!", "Thank you"),
    "Au revoir !": ("Bye!", "Goodbye!", "See you!"),
    "Oui.": ("Do you speak French?", "Can you answer in French?"),
    "Un, deux, trois.": ("Count to three.", "Count from one to three."),
}

CAPITALS = (
    "Hello!", "Hi!", "How are you?", "Thank you!", "Bye!", "What is cortex?", "What is neuron?", "Who are you?",
    "Good morning!", "What is a lease?", "Which port do clients use?", "Explain cortex.", "Tell me a joke.",
    "Which models does neuron run?", "Are you a robot?", "I am sad.", "I am happy.",
)  # fmt: skip


def _facts():
    facts = [Fact(answer, forms) for answer, forms in (CONCEPTS | SMALL_TALK).items()]

    def add(forms, name, answer):
        facts.append(Fact(answer, tuple(form.format(name) for form in forms)))

    for key, (what, default) in KEYS.items():
        add(KEY_FORMS, key, f"{key} {what}.")
        if default:
            add(DEFAULT_FORMS, key, f"The default of {key} is {default}.")
    for command, what in COMMANDS.items():
        add(COMMAND_FORMS, command, f"{command} {what}.")
    for path, what in ENDPOINTS.items():
        add(ENDPOINT_FORMS, path, f"{path} {what}.")
    for error, what in ERRORS.items():
        add(ERROR_FORMS, error, f"{error} means that {what}.")
    return facts


FACTS = _facts()
ANSWERS = {form: fact.answer for fact in FACTS for form in fact.forms}
