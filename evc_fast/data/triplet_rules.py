"""From a dependency parse to one subject-predicate-object triplet: the rules behind `SpacyTriplets`.

The main clause is found first (verb, subject, object, active or passive), then what it lacks is filled in. Labels are
those of spaCy's English models (ClearNLP's). Captions are short, often lower-case and without a full stop, and the
parser slips on some; a slip that recurs in captions is mended here where the sentence itself shows that it is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token

__all__ = ["MISSING", "Triplet", "triplet_of"]

Triplet = tuple[str, str, str]  # subject, predicate, object: each its head word's lemma

MISSING = "something"  # stands in for a part that a caption does not have


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LINKING = _words("be look seem appear feel become get turn grow sound smell taste remain stay")
# Take no direct object of their own: of what follows "V and V", they share the phrases, not the object.
_INTRANSITIVE = _words("""
    appear arrive bark bow chat cheer chuckle clap come cough crawl cry dance die disappear fall fight frown giggle go
    grin howl jog jump kneel laugh lie look nod quarrel rest rise roar run scream shiver shout sing sit skate sleep
    smile sneeze sob sparkle stand stare swim talk tremble wait wake walk wave weep wink yawn yell
""")
# Participles that name a feeling: with "be" they are adjectives, unless an agent makes them passive.
_FEELINGS = _words("""
    alarmed amazed amused annoyed ashamed astonished bored confused delighted depressed devastated disappointed
    disgusted disturbed embarrassed excited exhausted fascinated frightened frustrated heartbroken horrified inspired
    interested irritated moved offended overjoyed overwhelmed panicked pleased puzzled relaxed relieved satisfied
    scared shocked startled stressed surprised tempted terrified thrilled tired touched troubled upset worried
""")
_NOT_ADVERBIAL = _words("not n't never no still just also too then now so very only even already yet again")
_SINGULAR = _words("a an another one this that each every")
_WITHIN_PREPOSITION = _words("front top spite")  # nouns of "in front of", "on top of": no article before them
_QUESTION_TAGS = _words("WP WDT WRB WP$")
# The lemmatiser makes "cooky" of "cookies".
_SINGULAR_OF = {f"{noun}s": noun for noun in _words("brownie cookie genie hoodie movie selfie smoothie zombie")}


class _Clause(NamedTuple):
    """Heads of a clause as they stand in the sentence; `subject` is of the active form."""

    verb: Token
    subject: Token | None
    object: Token | None
    passive: bool


def triplet_of(doc: Doc) -> Triplet:
    """The triplet of a parsed caption; parts are lower-case lemmas, "something" where there is none."""
    if not len(doc):
        return MISSING, MISSING, MISSING
    root = _main(doc)
    taken = _verb_taken_for_noun(doc, root)
    if taken is not None:
        subject, verb = taken
        return _lemma(subject), _lemma(verb), _lemma(_object(verb) or _complement(verb))
    verb, subject = _predicate(root)
    if verb is None:
        return _verbless(root)
    return _of_clause(verb, subject)


def _of_clause(verb: Token, subject: Token | None) -> Triplet:
    """`subject` stands outside of the clause, as the noun that a participle follows; None if it is the verb's own."""
    link = _link_of_feeling(verb)
    if link is not None:
        return _lemma(subject or _subject(verb)), _lemma(link), verb.lower_
    clause = _clause(verb, subject)
    object_ = clause.object if clause.passive else clause.object or _complement(clause.verb)
    return _lemma(clause.subject), _lemma(clause.verb), _lemma(object_)


# The main clause


def _main(doc: Doc) -> Token:
    """The root of the first sentence that has a verb, else of the first."""
    roots = [sentence.root for sentence in doc.sents]
    return next((root for root in roots if root.pos_ in ("VERB", "AUX")), roots[0])


def _predicate(root: Token) -> tuple[Token | None, Token | None]:
    """(verb, subject outside of its clause) of a sentence, a "there is", or a noun with a participle; (None, None)."""
    if _child(root, "expl") is not None and root.lemma_ == "be":
        there = _child(root, "attr", "nsubj", "dobj")
        if there is None:
            return root, None
        clause = _clause_on(there)
        return (clause, there) if clause is not None else (root, there)
    if root.pos_ in ("VERB", "AUX") or _child(root, "nsubj", "nsubjpass") is not None:
        return root, None
    clause = _clause_on(root)
    return (clause, root) if clause is not None else (None, None)


def _clause_on(noun: Token) -> Token | None:
    """The verb of the participle or relative clause on a noun."""
    return next((t for t in noun.children if t.dep_ in ("acl", "relcl") and t.pos_ in ("VERB", "AUX")), None)


def _verb_taken_for_noun(doc: Doc, root: Token) -> tuple[Token, Token] | None:
    """(subject, verb) where the parser read "a couple dances" as a plural noun: "a" does not go with a plural."""
    for token in doc:
        if token.tag_ != "NNS" or token.i == 0 or _child(token, "nsubj", "nsubjpass") is not None:
            continue
        noun = doc[token.i - 1]
        if noun.head != token or noun.dep_ not in ("compound", "amod", "nmod"):
            continue
        disagrees = any(t.dep_ == "det" and t.lower_ in _SINGULAR for t in token.lefts)
        joined = any(t.dep_ == "conj" and t.tag_ in ("VBZ", "VBP") for t in token.children)
        if token == root and (disagrees or joined or token.lemma_ in _INTRANSITIVE):
            return noun, token
        if disagrees and token.dep_ == "pobj" and token.head.head == root and root.pos_ in ("NOUN", "PROPN"):
            return root, token
    return None


# Subject, object, voice


def _clause(verb: Token, outside: Token | None) -> _Clause:
    verb = _participle(verb) or verb
    subject = outside or _subject(verb)
    agent = _agent(verb)
    passive = agent is not None or _child(verb, "nsubjpass", "auxpass") is not None
    # A participle on a noun, "a car destroyed in the storm".
    passive = passive or (verb.tag_ == "VBN" and verb.dep_ in ("acl", "ROOT") and _child(verb, "aux", "dobj") is None)
    if passive:
        return _Clause(verb, agent, subject, True)
    if subject is None:
        inverted = _inverted_subject(verb)
        if inverted is not None:
            return _Clause(verb, inverted, None, False)
    return _Clause(verb, subject, _object(verb), False)


def _subject(verb: Token) -> Token | None:
    """The verb's subject, or that of the verb which it is a complement of."""
    subject = _child(verb, "nsubj", "nsubjpass", "csubj")
    if subject is None and verb.dep_ in ("acomp", "attr", "xcomp", "ccomp") and verb.head.lemma_ in _LINKING:
        subject = _child(verb.head, "nsubj", "nsubjpass")
    if subject is None and _child(verb, "det") is not None:  # "a frightened deer runs" taken for one noun
        subject = _child(verb, "compound", "nmod")
    if subject is not None and subject.lower_.endswith("ly"):  # an adverb taken for a noun: "a child fearfully watches"
        subject = _child(subject, "compound", "nmod", "amod") or subject
    return subject


def _participle(verb: Token) -> Token | None:
    """What the parser made a complement of "be": "kids being scared by a ghost", and the slip "a girl is dance"."""
    for token in verb.rights if verb.lemma_ in ("be", "get") else ():
        if token.dep_ in ("acomp", "xcomp", "ccomp") and _agent(token) is not None:
            return token
        if token.dep_ == "attr" and token.lemma_ in _INTRANSITIVE and not list(token.lefts):
            return token
    return None


def _agent(verb: Token) -> Token | None:
    by = _child(verb, "agent")
    return None if by is None else _child(by, "pobj")


def _inverted_subject(verb: Token) -> Token | None:
    """The noun behind the verb in "on the bench sits a man": a finite verb without subject, a phrase before it."""
    if verb.tag_ not in ("VBZ", "VBD", "VBP") or not any(t.dep_ in ("prep", "advmod") for t in verb.lefts):
        return None
    return next((t for t in verb.rights if t.dep_ in ("dobj", "attr", "npadvmod")), None)


def _link_of_feeling(verb: Token) -> Token | None:
    """The "is" of "is shocked", which the parser may read as a passive, though nothing shocks."""
    return _child(verb, "auxpass") if verb.lower_ in _FEELINGS and _agent(verb) is None else None


def _object(verb: Token) -> Token | None:
    """Direct object, else indirect one, else that of a clause; a linking verb's complement; shared by joined verbs."""
    if _child(verb, "expl") is not None:  # what is there is the subject
        return None
    if verb.lemma_ in _LINKING:
        complement = next((t for t in verb.rights if t.dep_ in ("acomp", "attr", "oprd") and _says(t)), None)
        if complement is None and verb.lemma_ == "be":  # "Is the dog afraid?": the adjective hangs on the noun
            complement = next((t for s in verb.rights if s.dep_ == "nsubj" for t in s.rights if t.pos_ == "ADJ"), None)
        if complement is not None:
            return complement
    direct = [t for t in verb.children if t.dep_ == "dobj" and _says(t)]
    if direct:
        return _direct(direct)
    indirect = _child(verb, "dative")
    if indirect is not None and indirect.pos_ != "ADP":
        return indirect
    of_clause = _object_clause(verb)
    if of_clause is not None:
        return of_clause
    last = _last_joined(verb)
    if last is not None and verb.lemma_ not in _INTRANSITIVE:
        return _child(last, "dobj")
    return None


def _direct(objects: list[Token]) -> Token:
    """Of two direct objects without "and" the second: the first is whom it is given to."""
    first, *rest = objects
    joined = any(t.dep_ == "cc" for t in first.subtree)
    return first if joined or not rest else rest[-1]


def _object_clause(verb: Token) -> Token | None:
    """Its own subject ("makes the children laugh"), else its verb; a purpose is no object ("runs to catch a bus")."""
    for token in verb.rights:
        if token.dep_ not in ("xcomp", "ccomp") or token.pos_ not in ("VERB", "AUX"):
            continue
        subject = _child(token, "nsubj")
        finite = token.tag_ in ("VBZ", "VBD", "VBP") or _child(token, "mark") is not None
        if subject is not None and not finite:
            return subject
        if verb.lemma_ not in _INTRANSITIVE:
            return token
    return None


def _last_joined(verb: Token) -> Token | None:
    """The last of verbs that are joined with nothing between them: "washes and cuts", "run, jump and scream"."""
    last = verb
    while True:
        joined = next((t for t in last.rights if t.dep_ == "conj"), None)
        between = () if joined is None else last.doc[last.i + 1 : joined.i]
        if joined is None or any(t.dep_ not in ("cc", "punct", "aux") for t in between):
            return last if joined is None and last != verb else None
        last = joined


# What stands in for an object


def _complement(verb: Token) -> Token | None:
    """Prepositional object behind the verb, or before it; else adverb, particle or adjective, in the same order."""
    last = _last_joined(verb)
    if last is not None and _child(last, "dobj") is not None:
        last = None  # what follows belongs to the last verb and its object
    behind = list(verb.rights) if last is None else [*verb.rights, *last.rights]
    if _child(verb, "expl") is not None:  # what is there is the subject; where it is may hang on it
        behind = [t for token in behind for t in ([*token.rights] if token.dep_ in ("attr", "nsubj") else [token])]
    else:  # "fights angry in a bar": the phrase may hang on the adjective
        behind += [t for token in behind if token.dep_ in ("acomp", "oprd", "advmod") for t in token.rights]
    for side in (behind, list(verb.lefts)):
        found = next((noun for noun in map(_prepositional, side) if noun is not None), None)
        if found is not None:
            return found
    for side in (behind, list(verb.lefts)):
        found = next((t for t in side if t.dep_ in ("advmod", "prt", "acomp", "oprd", "attr") and _says(t, verb)), None)
        if found is not None:
            return found
    return None


def _prepositional(token: Token) -> Token | None:
    """The object of the preposition that `token` is, or that an adverb begins ("next to", "out of")."""
    if token.dep_ not in ("prep", "dative", "agent", "advmod"):
        return None
    noun = _child(token, "pobj")
    if noun is None:
        further = _child(token, "prep")
        return None if further is None else _prepositional(further)
    if noun.lower_ in _WITHIN_PREPOSITION and _child(noun, "det", "poss") is None:
        further = _child(noun, "prep")
        noun = noun if further is None else _prepositional(further) or noun
    return noun if _says(noun) else None


def _verbless(root: Token) -> Triplet:
    """A noun with what follows it, or an adjective alone."""
    if root.pos_ in ("ADJ", "ADV"):
        return MISSING, MISSING, _lemma(root)
    behind = list(root.rights)
    noun = next((noun for noun in map(_prepositional, behind) if noun is not None), None)
    adjective = next((t for t in behind if t.pos_ == "ADJ" and t.dep_ in ("amod", "acomp", "advmod")), None)
    return _lemma(root), MISSING, _lemma(noun or adjective)


# Words


def _child(token: Token, *labels: str) -> Token | None:
    return next((child for child in token.children if child.dep_ in labels), None)


def _says(token: Token, verb: Token | None = None) -> bool:
    """Whether a word may fill a part: those that ask, negate or only place in discourse do not; "stands still" does."""
    if token.lower_ == "still" and verb is not None and token.i > verb.i:
        return True
    return token.tag_ not in _QUESTION_TAGS and token.lower_ not in _NOT_ADVERBIAL and token.dep_ != "neg"


def _lemma(token: Token | None) -> str:
    """Lower-case lemma, the lemmatiser's slips on a lost "e" mended; "something" for None and for words that ask."""
    if token is None or token.tag_ in _QUESTION_TAGS:
        return MISSING
    word, lemma = token.lower_, token.lemma_.lower().strip()
    if word in _SINGULAR_OF:
        return _SINGULAR_OF[word]
    if token.tag_ == "VBN" and token.dep_ in ("acomp", "oprd", "attr") and _agent(token) is None:  # "is excited"
        return word
    if token.tag_.startswith("V"):
        lemma = _with_final_e(word, lemma)
    return lemma if any(letter.isalnum() for letter in lemma) else MISSING


def _with_final_e(word: str, lemma: str) -> str:
    """`scare` for `scares`, which was taken for a form of `scar`: that one would be written with two r."""
    syllable = len(lemma) > 2 and lemma[-1] not in "aeiouwxys" and lemma[-2] in "aeiou" and lemma[-3] not in "aeiou"
    single = sum(letter in "aeiou" for letter in lemma) == 1
    lost = word in (lemma + "ing", lemma + "ed", lemma + "es") and not lemma.endswith(("sh", "ch", "z"))
    return lemma + "e" if syllable and single and lost else lemma
