"""The fake teacher, with faults that words in the text set off. Put in the fake's place by `install`, or for a whole process by
running this file as if it were the command `kdcache`. Where its model is a file, it also hangs while it is loaded, once: the
file is gone then.

    poison   fails, every time
    flaky    fails the first time that this process meets it
    broken   fails, and closes the teacher, as vLLM does
    wrong    is answered with probabilities above 1
    slow     takes a fifth of a second
    hang     never comes back; Ctrl-C ends it
    deaf     never comes back, and nothing but the end of the process ends it
    mute     fails when it is to be answered, every time
    writes   takes a fifth of a second to be answered
"""

import os
import sys
import time

from kdcache import teacher as teachers
from kdcache.errors import TeacherError
from kdcache.format.record import Distributions
from kdcache.teacher.fake import FakeBackend, FakeTeacher

met = set()


class FaultyTeacher(FakeTeacher):
    def __init__(self, config):
        super().__init__(config)
        if os.path.isfile(config.model):
            os.unlink(config.model)
            while True:
                time.sleep(0.05)

    def score(self, sequences, selection, features=()):
        return map(self._faulty, sequences, super().score(sequences, selection, features))

    def generate(self, prompts, config, tokenizer, observe=lambda _: None):
        return map(self._faulty_answer, prompts, super().generate(prompts, config, tokenizer, observe))

    def _faulty_answer(self, prompt, answer):
        text = text_of(prompt.sequence)
        if "mute" in text:
            raise TeacherError(f"{prompt.source}: the teacher has nothing to say")
        if "writes" in text:
            time.sleep(0.2)
        return answer

    def _faulty(self, sequence, distributions):
        text = text_of(sequence)
        if "poison" in text or ("flaky" in text and text not in met):
            met.add(text)
            raise TeacherError(f"{sequence.source}: the teacher choked")
        if "broken" in text:
            self.close()
            raise TeacherError("the engine died")
        if "wrong" in text:
            fields = {name: getattr(distributions, name) for name in Distributions.__dataclass_fields__}
            return Distributions(**fields | {"logprobs_E": distributions.logprobs_E + 9})
        if "slow" in text:
            time.sleep(0.2)
        while "hang" in text or "deaf" in text:
            try:
                time.sleep(0.05)
            except KeyboardInterrupt:
                if "hang" in text:
                    raise
        return distributions


def text_of(sequence):
    return bytes(int(i) for i in sequence.input_ids_N if i < 256).decode("utf-8", "replace")


class FaultyBackend(FakeBackend):
    teacher = "faulty_teacher:FaultyTeacher"


def install(table=teachers.BACKENDS, setitem=dict.__setitem__):
    setitem(table, "fake", "faulty_teacher:FaultyBackend")


if __name__ == "__main__":
    install()
    sys.modules["faulty_teacher"] = sys.modules["__main__"]
    from kdcache.capture.executors import placement
    from kdcache.capture.watch import heartbeat
    from kdcache.cli.main import main

    heartbeat.GRACE_SECONDS = float(os.environ.get("GRACE_SECONDS", heartbeat.GRACE_SECONDS))
    placement.WARN_SECONDS = float(os.environ.get("PLACE_WARN_SECONDS", placement.WARN_SECONDS))
    sys.exit(main())
